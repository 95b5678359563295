"""Files that a kill leaves whole: the one of before, or the new one."""

from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write a whole file beside ``path``, then put it in its place in one step."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)
