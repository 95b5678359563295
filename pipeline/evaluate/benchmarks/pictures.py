"""Pictures below a benchmark's folder: whether they are there, and their bytes. Nothing is decoded."""

from collections.abc import Iterable
from pathlib import Path

from alignkd.errors import DataError, SampleError
from alignkd.pipeline.data.image_paths import image_path
from alignkd.plain_files import read_plain

LARGEST_PICTURE = 256 * 2**20


def read_picture(folder: Path, reference: str) -> bytes:
    """The bytes of a picture below a folder.

    Raises:
        DataError: it is missing, too large, or lies outside.
    """
    try:
        return read_plain(image_path(folder, reference), LARGEST_PICTURE)
    except SampleError as error:
        raise DataError(str(error)) from error
    except (OSError, ValueError) as error:
        raise DataError(f"picture {reference!r:.300} in {folder}: {getattr(error, 'strerror', None) or error}") from error


def missing_pictures(folder: Path, references: Iterable[str]) -> list[str]:
    """References that name no file below a folder, each once.

    Raises:
        DataError: one leads out of the folder.
    """
    try:
        return [reference for reference in dict.fromkeys(references) if not _is_file(image_path(folder, reference))]
    except SampleError as error:
        raise DataError(str(error)) from error


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name that no file can have, for its length
        return False
