"""Where the image of a reference lies: a path inside the image folder, as the reference spells it.

Links are followed, since who made them owns the folder; references come with the data and cannot lead out of it.
"""

import os
from pathlib import Path

from alignkd.errors import SampleError


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
