"""Records in JSON or JSON lines: LLaVA, messages and ShareGPT."""

from collections.abc import Mapping

import numpy as np

from alignkd.pipeline.data.contract import Samples, Source
from alignkd.pipeline.data.files.data_file import data_size
from alignkd.pipeline.data.samples import SampleFile


def open_source(source: Source) -> Samples:
    """As :meth:`alignkd.pipeline.data.contract.Reader.open_source`."""
    return SampleFile(source.data, source)


def known_source(source: Source, keys: np.ndarray, locators: Mapping[str, np.ndarray]) -> Samples | None:
    """As :meth:`alignkd.pipeline.data.contract.Reader.known_source`."""
    if not {"starts", "lengths"} <= locators.keys():
        return None
    numbers = locators.get("numbers")
    return SampleFile.known(source.data, keys, locators["starts"], locators["lengths"], numbers, source=source)


def size(source: Source) -> int:
    """As :meth:`alignkd.pipeline.data.contract.Reader.size`."""
    return data_size(source.data)
