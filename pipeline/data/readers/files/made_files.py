"""Files that are made from data once and kept on this machine's disk: what is unpacked of archives and tables.

They lie in one folder of a stated size. Any of them may vanish: it is made again from the data when it is needed. The least
recently used ones are removed where the folder grows beyond its size.
"""

import contextlib
import hashlib
import os
import secrets
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from alignkd.errors import ConfigError

FOLDER_VARIABLE, SIZE_VARIABLE = "ALIGNKD_DATA_CACHE", "ALIGNKD_DATA_CACHE_GIB"
DEFAULT_GIB = 50.0
_SUFFIX = ".made"


def made_file(about: str, make: Callable[[Path], None], environment: Mapping[str, str] = os.environ) -> Path:
    """The file that ``make`` writes; ``about`` says what it is made from and how, versions included.

    Raises:
        ConfigError: the folder cannot be written to, or the size is no number above 0.
    """
    limit, folder = _limit(environment), _folder(environment)
    path = folder / (hashlib.sha256(about.encode("utf-8", "surrogatepass")).hexdigest()[:32] + _SUFFIX)
    with contextlib.suppress(FileNotFoundError):
        os.utime(path)  # when it was used last
        return path
    temporary = folder / f".{secrets.token_hex(8)}.tmp"
    try:
        make(temporary)
        # Two processes may make the same file; both are whole.
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _make_room(folder, limit, path)
    return path


def _make_room(folder: Path, limit: int, newest: Path) -> None:
    found = list[tuple[float, int, Path]]()
    for path in folder.glob(f"*{_SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):
            about = path.stat()
            found.append((about.st_mtime, about.st_size, path))
    size = sum(size for _, size, _ in found)
    for _, bytes_of_it, path in sorted(found):
        if size <= limit:
            return
        if path != newest:
            path.unlink(missing_ok=True)
            size -= bytes_of_it


def _folder(environment: Mapping[str, str]) -> Path:
    named = environment.get(FOLDER_VARIABLE, "")
    base = environment.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(named or os.path.join(base, "alignkd", "data"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ConfigError(
            f"{folder}, where alignkd keeps what it unpacks of data, cannot be written to ({error.strerror}): set"
            f" {FOLDER_VARIABLE} to a folder with room"
        ) from error


def _limit(environment: Mapping[str, str]) -> int:
    text = environment.get(SIZE_VARIABLE, "")
    try:
        gib = float(text or DEFAULT_GIB)
        if not 0 < gib < 1 << 20:
            raise ValueError
    except ValueError as error:
        raise ConfigError(f"{SIZE_VARIABLE}={text}: expected a number of GiB above 0, such as {SIZE_VARIABLE}=20") from error
    return int(gib * (1 << 30))
