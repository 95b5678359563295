"""Parquet and Arrow files behind one face: text by row, images by row."""

import threading
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from itertools import accumulate
from typing import Any, BinaryIO

import pyarrow as pa

from alignkd.errors import DataError
from alignkd.pipeline.data.files.data_file import open_data_file
from alignkd.pipeline.data.readers.columnar.arrow_rows import ArrowRows
from alignkd.pipeline.data.readers.columnar.columns import IMAGES, embeds_images, needs_bytes
from alignkd.pipeline.data.readers.columnar.parquet_text import open_parquet, write_arrow_text, write_images, write_text
from alignkd.pipeline.data.readers.files.made_file import made_file
from alignkd.pipeline.data.readers.files.shard_file import ShardFile

_GROUPS_OPEN = 16


class TableFile(ABC):
    """One file of a table. It holds nothing open when it is pickled, and may be read by several threads."""

    def __init__(self, name: str) -> None:
        self.name, self.where = name, f"data file {name}"
        self.file = ShardFile(name)
        self._clear()

    def _clear(self) -> None:
        self._lock = threading.RLock()
        self._text: ArrowRows | None = None
        self._embeds: bool | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "where": self.where, "file": self.file}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._clear()

    @property
    def text(self) -> ArrowRows:
        """The rows, as far as records need them."""
        if self._text is None:
            with self._lock:
                self._text = self._text or self._open_text()
        return self._text

    @property
    def embeds(self) -> bool:
        """Whether images lie in the file."""
        if self._embeds is None:
            schema = self._schema()
            fields = [] if schema is None else [schema.field(name) for name in IMAGES if name in schema.names]
            self._embeds = any(embeds_images(field.type) for field in fields)
        return self._embeds

    @abstractmethod
    def images(self, row: int) -> list[bytes | str]:
        """The images of a row: the bytes of each, or its path where the file has no bytes of it."""

    @abstractmethod
    def _open_text(self) -> ArrowRows: ...

    @abstractmethod
    def _schema(self) -> pa.Schema | None: ...

    def _made(self, what: str, make: Callable[[BinaryIO], None]) -> ArrowRows:
        about = f"{what} of {self.file.absolute}, {self.file.version()}, format 1, pyarrow {pa.__version__}"
        return ArrowRows(lambda: made_file(about, make), self.where)


class ParquetFile(TableFile):
    """A Parquet file: its text is copied once, and the images of a row group when one of them is needed."""

    def _clear(self) -> None:
        super()._clear()
        self._starts: list[int] | None = None
        self._groups: OrderedDict[int, ArrowRows] = OrderedDict()

    def images(self, row: int) -> list[bytes | str]:
        """As :meth:`TableFile.images`."""
        with self._lock:
            if self._starts is None:
                with self._open() as parquet:
                    rows = (parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups))
                    self._starts = list(accumulate(rows, initial=0))
            if not 0 <= row < self._starts[-1]:
                raise DataError(f"{self.where} has {self._starts[-1]:,} rows, and no row {row:,}: the file has changed")
            group = bisect_right(self._starts, row) - 1
            if group not in self._groups:
                self._groups[group] = self._made(f"images {group}", lambda target: self._write(group, target))
            self._groups.move_to_end(group)
            if len(self._groups) > _GROUPS_OPEN:
                self._groups.popitem(last=False)
            images, at = self._groups[group], row - self._starts[group]
        return images.images(at)

    def _write(self, group: int, target: BinaryIO) -> None:
        with self._open() as parquet:
            write_images(parquet, group, target, self.where)

    def _open_text(self) -> ArrowRows:
        def make(target: BinaryIO) -> None:
            with self._open() as parquet:
                write_text(parquet, target, self.where)

        return self._made("text", make)

    def _schema(self) -> pa.Schema:
        with self._open() as parquet:
            return parquet.schema_arrow

    def _open(self) -> Any:
        return open_parquet(self.file.open(), self.where)


class ArrowFile(TableFile):
    """An Arrow file of ``save_to_disk``: mapped into memory; one that lies elsewhere is copied first."""

    def _clear(self) -> None:
        super()._clear()
        self._rows: ArrowRows | None = None

    @property
    def rows(self) -> ArrowRows:
        """All of the file."""
        if self._rows is None:
            with self._lock:
                self._rows = self._rows or ArrowRows(lambda: open_data_file(self.name), self.where)
        return self._rows

    def images(self, row: int) -> list[bytes | str]:
        """As :meth:`TableFile.images`."""
        return self.rows.images(row)

    def _open_text(self) -> ArrowRows:
        rows = self.rows
        names = [name for name in IMAGES if name in rows.columns]
        if not any(needs_bytes(batch.column(name)) for batch in (rows.batches() if names else ()) for name in names):
            return rows
        return self._made("text", lambda target: write_arrow_text(rows, target, self.where))

    def _schema(self) -> pa.Schema | None:
        return self.rows.schema
