"""Where the image of a reference lies: a path inside the image folder, as the reference spells it.

Links are followed, since who made them owns the folder; references come with the data and cannot lead out of it.
"""

import os
from pathlib import Path

from alignkd.errors import ConfigError, SampleError


def image_path(root: Path, reference: str) -> Path:
    """The path of an image; nothing is looked up.

    Raises:
        SampleError: it lies outside the image folder.
    """
    # normpath without the file system: "link/.." is where the link stands, not where it leads.
    path = os.path.normpath(root / reference)
    inside = [os.path.abspath(root)]
    if os.path.isabs(reference):
        inside.append(os.path.realpath(root))
    if not any(Path(os.path.abspath(path)).is_relative_to(folder) for folder in inside):
        raise SampleError(f"image {reference!r} lies outside the image folder {root}")
    return Path(path)


def check_image_folder(folder: str | None, option: str = "--images") -> None:
    """Refuse an image folder that is not there, before a model is loaded and every sample is rejected for it.

    Raises:
        ConfigError: names the folder.
    """
    if folder is not None and "://" not in folder and not Path(folder).is_dir():
        found = "is not a folder" if Path(folder).exists() else "does not exist"
        raise ConfigError(f"{option} {folder} {found}; give the folder that the image paths of the data file are relative to")
