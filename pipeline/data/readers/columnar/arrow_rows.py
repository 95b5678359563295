"""Random access to the rows of an Arrow file on this machine, which is mapped into memory: only what is read takes any.

Arrow believes what a file says about itself, so each batch is validated before its first use.
"""

import bisect
import threading
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import pyarrow as pa

from alignkd.errors import DataError, wrap_errors
from alignkd.pipeline.data.readers.columnar.columns import IMAGES, image_values, record_columns, records
from alignkd.pipeline.data.readers.files.made_file import mapped

_FILE_MAGIC = b"ARROW1"
_ERRORS = (pa.ArrowException, OSError, ValueError)


class ArrowRows:
    """The rows of one Arrow file, in the stream format (as ``save_to_disk`` writes it) or the file format.

    ``open_file`` is called once, when the first row is needed. Several threads may read; it cannot be pickled.
    """

    def __init__(self, open_file: Callable[[], BinaryIO], where: str) -> None:
        self.open_file, self.where = open_file, where
        self._open: tuple[list[pa.RecordBatch], list[int]] | None = None
        self._columns: list[str] | None = None
        self._valid: set[int] = set()
        self._lock = threading.Lock()

    @property
    def schema(self) -> pa.Schema | None:
        """The columns and their types; None where the file has no rows."""
        batches = self._opened()[0]
        return batches[0].schema if batches else None

    @property
    def columns(self) -> list[str]:
        """The columns of records.

        Raises:
            DataError: there is no conversation among them.
        """
        if self._columns is None:
            self._columns = record_columns(self.schema, self.where) if self.schema else []
        return self._columns

    def __len__(self) -> int:
        return self._opened()[1][-1]

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All rows.

        Raises:
            DataError: the file is damaged.
        """
        for number in range(len(self._opened()[0])):
            yield self._batch(number)

    def record(self, row: int) -> dict[str, Any]:
        """The record of one row; the bytes of images are not touched."""
        batch, at = self._find(row)
        with wrap_errors(DataError, f"{self.where}, row {row}: it cannot be read", *_ERRORS):
            return next(records(batch.slice(at, 1), self.columns))

    def images(self, row: int) -> list[bytes | str]:
        """The images of a row: the bytes of each, or its path where the table has no bytes of it."""
        batch, at = self._find(row)
        with wrap_errors(DataError, f"{self.where}, row {row}: its images cannot be read", *_ERRORS):
            values = (batch.column(name)[at] for name in IMAGES if name in batch.schema.names)
            return next((image_values(value.as_py()) for value in values if value.is_valid), [])

    def _find(self, row: int) -> tuple[pa.RecordBatch, int]:
        starts = self._opened()[1]
        number = bisect.bisect_right(starts, row) - 1
        if not 0 <= row < starts[-1]:
            raise DataError(f"{self.where} has {starts[-1]:,} rows, and no row {row:,}: it has changed since it was indexed")
        return self._batch(number), row - starts[number]

    def _batch(self, number: int) -> pa.RecordBatch:
        batch = self._opened()[0][number]
        if number not in self._valid:
            with wrap_errors(DataError, f"{self.where}: damaged", *_ERRORS):
                batch.validate(full=True)
            self._valid.add(number)
        return batch

    def _opened(self) -> tuple[list[pa.RecordBatch], list[int]]:
        if self._open is None:
            with self._lock:
                self._open = self._open or self._read()
        return self._open

    def _read(self) -> tuple[list[pa.RecordBatch], list[int]]:
        with wrap_errors(DataError, f"{self.where}: not a whole Arrow file; copy or write it again", *_ERRORS):
            data = mapped(self.open_file())
            buffer = pa.py_buffer(data)
            if data[: len(_FILE_MAGIC)] == _FILE_MAGIC:
                reader = pa.ipc.open_file(buffer)
                batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            else:
                batches = list(pa.ipc.open_stream(buffer))
        starts = [0]
        for batch in batches:
            starts.append(starts[-1] + batch.num_rows)
        return batches, starts
