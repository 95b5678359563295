"""The samples of tables: rows of Parquet files, or of the Arrow files of a saved dataset."""

import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from alignkd.errors import DataError, SampleError
from alignkd.extras import require
from alignkd.models.encoders.image_files import MAX_IMAGE_BYTES, ImageError
from alignkd.pipeline.data.contract import Samples, Source
from alignkd.pipeline.data.images.placed import placed
from alignkd.pipeline.data.images.places import place_of, read_place
from alignkd.pipeline.data.readers.key_index import KeyIndex
from alignkd.pipeline.data.sample import Sample, faulty_sample, read_sample

LOCATORS = ("tables", "rows", "characters")
_SCHEME = "row:"


def require_pyarrow(data: str) -> None:
    """ConfigError where pyarrow is not installed."""
    require("pyarrow", f"--data {data}")


class TableSamples(Samples):
    """The rows of several files, one after the other.

    ``keys`` and ``locators`` are what an earlier reading found; without them the text columns are read as a whole.

    Raises:
        DataError: a file cannot be read or has no column of conversations, or none of the records can be read.
        TransientError: storage does not answer.
    """

    def __init__(
        self,
        source: Source,
        files: Sequence[Any],
        keys: np.ndarray | None = None,
        locators: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.path, self.source, self.files = source.data, source, list(files)
        if keys is not None and locators is not None:
            self.keys, self._places = keys, {name: locators[name] for name in LOCATORS}
        else:
            self._index()

    def _index(self) -> None:
        from alignkd.pipeline.data.readers.columnar.columns import records

        index, places = KeyIndex(), {name: array("q") for name in LOCATORS}
        for number, file in enumerate(self.files):
            row = 0
            for batch in file.text.batches():
                for record in records(batch, file.text.columns):
                    sample = _parse(record, file.where, row, self.source.merge_turns)
                    index.add(sample)
                    length = sum(len(text) for _, text in sample.turns)
                    for column, value in zip(places.values(), (number, row, length), strict=True):
                        column.append(value)
                    row += 1
        index.check(f"data {self.path}", "samples in its rows")
        self.faults, self.keys = index.faults, index.keys
        self.image_hashes, self.image_counts = index.image_hashes, index.image_counts
        self._places = {name: np.asarray(column) for name, column in places.items()}

    def locators(self) -> dict[str, np.ndarray]:
        """File, row in it, and characters of the text."""
        return dict(self._places)

    @property
    def image_space(self) -> str:
        """The image folder where no image lies in the files, else these."""
        return str(self.path) if any(file.embeds for file in self.files) else str(self.source.images)

    @property
    def sizes(self) -> np.ndarray:
        """Characters of each text."""
        return self._places["characters"]

    def __getitem__(self, index: int) -> Sample:
        number, row = int(self._places["tables"][index]), int(self._places["rows"][index])
        if not 0 <= number < len(self.files):
            raise DataError(f"data {self.path} has {len(self.files)} files, and no file {number}: it has changed")
        file = self.files[number]
        sample = _parse(file.text.record(row), file.where, row, self.source.merge_turns)
        if sample.key != self.key(index):
            raise DataError(
                f"{file.where}, row {row}: the file has changed since it was indexed; restore it, or write another cache"
            )
        if not file.embeds:
            return placed(sample, self.source)
        places = [[type(file).__name__, file.name, row, i, self.source.images, name] for i, name in enumerate(sample.images)]
        return replace(sample, source=self.source.name, places=tuple(_SCHEME + json.dumps(place) for place in places))


def read_image(place: str) -> bytes:
    """The bytes of an image in a table; where the table has none of it, those of the file of its path.

    Raises:
        ImageError: it is too large, or nowhere.
        DataError: the table cannot be read.
    """
    kind, name, row, number, root, reference = json.loads(place.removeprefix(_SCHEME))
    images: list[bytes | str] = _file(kind, name).images(row)
    found = images[number] if number < len(images) else ""
    if isinstance(found, str):
        if not found:
            raise ImageError(f"{name}, row {row}: its image {number} has neither bytes nor a path")
        try:
            return read_place(place_of(root, reference))
        except ImageError as error:
            raise ImageError(f"{error} ({name}, row {row}, holds the path of its image {number} alone)") from error
    if len(found) > MAX_IMAGE_BYTES:
        raise ImageError(f"{name}, row {row}: {len(found):,} bytes, more than the {MAX_IMAGE_BYTES:,} allowed")
    return bytes(found)


@lru_cache(maxsize=1024)
def _file(kind: str, name: str) -> Any:
    from alignkd.pipeline.data.readers.columnar import table_files

    return {"ParquetFile": table_files.ParquetFile, "ArrowFile": table_files.ArrowFile}[kind](name)


def _parse(record: dict[str, Any], where: str, row: int, merge_turns: bool) -> Sample:
    """The sample of a row; one that cannot be read has a fault."""
    from alignkd.pipeline.data.readers.columnar.columns import check_references

    try:
        check_references(record)
        return read_sample(record, merge_turns=merge_turns)
    except SampleError as error:
        name = f" (id {record['id']!r:.80})" if "id" in record else ""
        fault = f"{where}, row {row}{name}: {error}"
    try:
        return faulty_sample(record, b"", fault)
    except TypeError:  # a value that JSON has no form for
        return replace(faulty_sample(None, repr(sorted(record.items())).encode(), fault), id=str(record.get("id", "")))
