"""The one way in which jobs open data: :func:`open_samples`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from alignkd.errors import DataError
from alignkd.pipeline.config.shared import DataSettings, several
from alignkd.pipeline.data.contract import Samples, Source
from alignkd.pipeline.data.image_paths import check_image_folder
from alignkd.pipeline.data.readers.registry import reader_of
from alignkd.pipeline.runtime.retries import with_retries


def sources_of(config: DataSettings) -> tuple[Source, ...]:
    """The data that a configuration names, in their order."""
    data, images = several(config.data), several(config.images) or (None,)
    folders = images * len(data) if len(images) == 1 else images
    weights = config.data_weight or (1.0,) * len(data)
    return tuple(
        Source(one, folder, weight=weight, merge_turns=config.merge_turns)
        for one, folder, weight in zip(data, folders, weights, strict=True)
    )


def open_samples(config: DataSettings) -> Samples:
    """Index the data of a configuration.

    Raises:
        DataError: it cannot be read, or is not in a known format.
        TransientError: storage does not answer.
    """
    (source,) = sources_of(config)
    return reader_of(source).open_source(source)


def known_samples(config: DataSettings, keys: np.ndarray, locators: Mapping[str, np.ndarray]) -> Samples | None:
    """The samples of known keys ``[N, 16]`` in the places of :meth:`Samples.locators`; None where the readers are others."""
    (source,) = sources_of(config)
    return reader_of(source).known_source(source, keys, locators)


def describe_data(config: DataSettings) -> dict[str, Any]:
    """What a plan keeps of the data that it was made from: names and sizes; other data have others.

    Raises:
        DataError: the data is not there.
    """
    (source,) = sources_of(config)
    return {"data_file": Path(source.data).name, "bytes": _size(source.data)}


def check_images(config: DataSettings) -> None:
    """Refuse image folders that are not there, before a model is loaded and every sample is rejected for it.

    Raises:
        ConfigError: names the folder.
    """
    for folder in dict.fromkeys(source.images for source in sources_of(config)):
        check_image_folder(folder)


def _size(path: str) -> int:
    try:
        return with_retries(lambda: Path(path).stat().st_size, f"reading data file {path}")
    except OSError as error:
        raise DataError(f"data file {path}: {error.strerror}") from error
