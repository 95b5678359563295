"""Output folders, checked before a job begins, and files that a kill leaves whole: the one of before, or the new one."""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from alignkd.errors import ConfigError


def check_out_folder(out: Path, option: str = "--out") -> None:
    """Refuse an output folder that cannot be made, before the work whose results it should hold. ``option`` names it.

    Raises:
        ConfigError: it is a file, lies below one, or may not be written.
    """
    existing = next((path for path in (out, *out.parents) if path.exists()), None)
    if existing is not None and not existing.is_dir():
        raise ConfigError(f"{option} {out} cannot be a folder: {existing} is a file; choose another folder, or remove the file")
    if existing is not None and not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{option} {out}: the folder {existing} cannot be written: change its rights, or choose another {option}"
        )


def replace_text(path: Path, text: str) -> None:
    """Write a whole file beside ``path``, then put it in its place in one step."""
    replace_bytes(path, text.encode("utf-8"))


def replace_bytes(path: Path, content: bytes) -> None:
    """As :func:`replace_text`, for bytes."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)


def save_arrays(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write what :func:`numpy.load` reads as an ``.npz``; the suffix is added where it is missing.

    ``numpy.savez`` takes arrays as keyword arguments, so that one called ``file`` could not be saved.
    """
    path = Path(path)
    with zipfile.ZipFile(path if path.suffix == ".npz" else f"{path}.npz", "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)
