"""Parts of a Parquet file as Arrow files, since a row group is decoded as a whole: the text of all rows, or a group's images.

Of images the text has references only. Where an image has no path, its bytes are read, in batches, for their SHA-256.
"""

from collections.abc import Iterator
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from alignkd.errors import DataError, wrap_errors
from alignkd.pipeline.data.readers.columnar.arrow_rows import ArrowRows
from alignkd.pipeline.data.readers.columnar.columns import (
    IMAGES,
    embeds_images,
    is_list,
    needs_bytes,
    record_columns,
    references,
)

_ROWS, _ROWS_WITH_BYTES = 4096, 64


def open_parquet(file: BinaryIO, where: str) -> pq.ParquetFile:
    """A Parquet file; its footer alone is read.

    Raises:
        DataError: it is none, or cut short; ``where`` names it.
    """
    with wrap_errors(DataError, f"{where}: not a whole Parquet file; copy or download it again", pa.ArrowException, OSError):
        return pq.ParquetFile(file)


def write_text(parquet: pq.ParquetFile, target: BinaryIO, where: str) -> None:
    """Write what records need of a Parquet file to ``target``, an Arrow file of as many rows.

    Raises:
        DataError: a column is missing, or a part of the file is damaged.
    """
    columns = record_columns(parquet.schema_arrow, where)
    _write_text(_batches(parquet, columns), parquet.schema_arrow, columns, target, where)


def write_arrow_text(rows: ArrowRows, target: BinaryIO, where: str) -> None:
    """As :func:`write_text`, of an Arrow file with rows."""
    _write_text(rows.batches(), rows.schema, rows.columns, target, where)


def _write_text(batches: Iterator[pa.RecordBatch], types: pa.Schema, columns: list[str], target: BinaryIO, where: str) -> None:
    schema = pa.schema([_text_field(types.field(name)) for name in columns])
    with (
        wrap_errors(DataError, f"{where}: damaged", pa.ArrowException, OSError),
        pa.ipc.new_file(target, schema) as writer,
    ):
        for batch in batches:
            arrays = [_text_array(batch.column(field.name), field) for field in schema]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))


def write_images(parquet: pq.ParquetFile, group: int, target: BinaryIO, where: str) -> None:
    """Write the image columns of a row group to ``target``, an Arrow file of as many rows.

    Raises:
        DataError: a part of the file is damaged.
    """
    names = [name for name in IMAGES if name in parquet.schema_arrow.names]
    schema = pa.schema([parquet.schema_arrow.field(name) for name in names])
    with (
        wrap_errors(DataError, f"{where}, row group {group}: damaged", pa.ArrowException, OSError),
        pa.ipc.new_file(target, schema) as writer,
    ):
        for batch in parquet.iter_batches(_ROWS_WITH_BYTES, [group], names, use_threads=False):
            writer.write_batch(batch.select(names))


def _batches(parquet: pq.ParquetFile, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Record batches of all rows, with the bytes of images only in row groups where references need them."""
    text = [path for path in _leaves(parquet) if path.split(".")[0] in columns and not _is_bytes_of_image(parquet, path)]
    images = [name for name in columns if name in IMAGES and embeds_images(parquet.schema_arrow.field(name).type)]
    paths = [path for path in text if path.split(".")[0] in images]
    for group in range(parquet.num_row_groups):
        found = parquet.iter_batches(_ROWS, [group], paths, use_threads=False) if images else ()
        if any(name not in batch.schema.names or needs_bytes(batch.column(name)) for batch in found for name in images):
            yield from parquet.iter_batches(_ROWS_WITH_BYTES, [group], columns, use_threads=False)
        else:
            yield from parquet.iter_batches(_ROWS, [group], text, use_threads=False)


def _leaves(parquet: pq.ParquetFile) -> list[str]:
    return [parquet.schema.column(i).path for i in range(len(parquet.schema))]


def _is_bytes_of_image(parquet: pq.ParquetFile, path: str) -> bool:
    name, _, rest = path.partition(".")
    return name in IMAGES and embeds_images(parquet.schema_arrow.field(name).type) and rest.rpartition(".")[2] != "path"


def _text_field(field: pa.Field) -> pa.Field:
    """The field of the copy: of images their references."""
    if field.name not in IMAGES or not embeds_images(field.type):
        return field
    return pa.field(field.name, pa.list_(pa.string()) if is_list(field.type) else pa.string())


def _text_array(array: pa.Array, field: pa.Field) -> pa.Array:
    return array if array.type == field.type else pa.array(references(array), field.type)
