"""The columns of a table that make up records, and their values as Python objects.

``conversations`` or ``messages``, ``image`` or ``images``, and ``id``: lists and structures as tables store them, or JSON in a
text. A structure ``{"bytes", "path"}`` is an image, as the library ``datasets`` stores it; its reference is its path, else the
SHA-256 of its bytes. Bytes are touched only where there is no path.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from alignkd.errors import DataError, SampleError

TURNS = ("conversations", "messages")
IMAGES = ("image", "images")
FIELDS = (*TURNS, *IMAGES, "id", "video", "provenance")
"""The columns that are read; of each record, the fields that are not null."""

NO_REFERENCE = ""
"""Stands for an image that has neither a path nor bytes."""


def record_columns(schema: pa.Schema, where: str) -> list[str]:
    """The columns of records, in their order.

    Raises:
        DataError: there is no conversation, or a column holds none of the types that are read; ``where`` names the table.
    """
    found = [name for name in FIELDS if name in schema.names]
    if not any(name in TURNS for name in found):
        raise DataError(
            f"{where} has the columns {', '.join(schema.names[:20])}; expected 'conversations' (from, value) or 'messages'"
            " (role, content), beside 'image' or 'images' and 'id'. Rename the columns, or write the conversations into one"
        )
    for name in found:
        kind = schema.field(name).type
        if (name in IMAGES and not _holds_images(kind)) or (
            name in TURNS and not (is_list(kind) or _is_text(kind) or pa.types.is_struct(kind))
        ):
            expected = "paths, bytes or structures of bytes and path" if name in IMAGES else "lists of turns, or JSON in a text"
            raise DataError(f"{where}: the column {name!r} holds {kind}, expected {expected}")
    return found


def embeds_images(kind: pa.DataType) -> bool:
    """Whether an image column may hold images' bytes."""
    kind = kind.value_type if is_list(kind) else kind
    return _is_bytes(kind) or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)


def needs_bytes(array: pa.Array) -> bool:
    """Whether the reference of some image of a column is the SHA-256 of its bytes. Bytes are not touched."""
    values = array.flatten() if is_list(array.type) else array
    if _is_bytes(values.type):
        return bool(values.null_count < len(values))
    if not pa.types.is_struct(values.type) or not len(values):
        return False
    if values.type.get_field_index("path") < 0:
        return True
    return bool(pc.any(pc.and_(values.is_valid(), pc.struct_field(values, "path").is_null())).as_py())


def references(array: pa.Array) -> list[Any]:
    """The references of the images of each row of an image column: None, a text, or a list."""
    if is_list(array.type):
        return _lists(array, references(array.flatten()))
    if _is_bytes(array.type):
        return [None if value is None else hashlib.sha256(value).hexdigest() for value in array.to_pylist()]
    if not pa.types.is_struct(array.type):
        return array.to_pylist()  # type: ignore[no-any-return]
    valid = array.is_valid().to_pylist()
    if array.type.get_field_index("path") < 0:
        return [_digest(array, i) if there else None for i, there in enumerate(valid)]
    paths = pc.struct_field(array, "path").to_pylist()
    return [(path or _digest(array, i)) if there else None for i, (path, there) in enumerate(zip(paths, valid, strict=True))]


def records(batch: pa.RecordBatch, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The record of each row; a field whose value is null is left out, as in JSON.

    Images stand for themselves by their references. Text that should be JSON and is not stays as it is: reading the record
    says what is wrong with it.
    """
    values = {name: _values_of(name, batch.column(name)) for name in columns}
    for row in zip(*values.values(), strict=True):
        yield {name: value for name, value in zip(values, row, strict=True) if value is not None}


def check_references(record: dict[str, Any]) -> None:
    """SampleError for an image of which there is nothing."""
    for name in IMAGES:
        found = record.get(name)
        if found == NO_REFERENCE or (isinstance(found, list) and NO_REFERENCE in found):
            raise SampleError(f"{name!r} has an image with neither bytes nor a path")


def image_values(value: Any) -> list[bytes | str]:
    """The images of a row, from the value of its image column: the bytes of each, else its path; none for null."""
    images = value if isinstance(value, list) else [] if value is None else [value]
    found = [(image.get("bytes") or image.get("path")) if isinstance(image, dict) else image for image in images]
    return [image or NO_REFERENCE for image in found]


def _values_of(name: str, array: pa.Array) -> list[Any]:
    if name in IMAGES:
        found = references(array)
        return [_from_json(value, "[") for value in found] if name == "images" else found
    found = python_values(array)
    if name in TURNS:
        return [_turns(_from_json(value, "[{")) for value in found]
    return [_from_json(value, "{") for value in found] if name == "provenance" else found


def python_values(array: pa.Array) -> list[Any]:
    """As ``to_pylist``, several times faster for lists of structures; fields of a structure that are null are left out."""
    if is_list(array.type):
        return _lists(array, python_values(array.flatten()))
    if not pa.types.is_struct(array.type):
        return array.to_pylist()  # type: ignore[no-any-return]
    names = [array.type.field(i).name for i in range(array.type.num_fields)]
    columns = [python_values(child) for child in array.flatten()]
    rows = zip(*columns, strict=True) if columns else iter([()] * len(array))
    made = [{name: value for name, value in zip(names, row, strict=True) if value is not None} for row in rows]
    if array.null_count:
        return [value if there else None for value, there in zip(made, array.is_valid().to_pylist(), strict=True)]
    return made


def _lists(array: pa.Array, flat: list[Any]) -> list[Any]:
    """``flat`` cut into the lists of ``array``."""
    made: list[Any] = []
    at = 0
    for length in pc.list_value_length(array).to_pylist():
        made.append(None if length is None else flat[at : at + length])
        at += length or 0
    return made


def _digest(array: pa.Array, i: int) -> str:
    if array.type.get_field_index("bytes") < 0:
        return NO_REFERENCE
    value = array.field(array.type.get_field_index("bytes"))[i].as_py()
    return hashlib.sha256(value).hexdigest() if value else NO_REFERENCE


def _turns(value: Any) -> Any:
    """Turns that a table stores as one list for each of their fields, as ``datasets`` does with a sequence of structures."""
    columns = list(value.values()) if isinstance(value, dict) else []
    if all(isinstance(column, list) for column in columns) and len({len(column) for column in columns}) == 1:
        return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    return value


def _from_json(value: Any, beginnings: str) -> Any:
    if not isinstance(value, str) or value.lstrip()[:1] not in tuple(beginnings):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _holds_images(kind: pa.DataType) -> bool:
    kind = kind.value_type if is_list(kind) else kind
    is_struct = pa.types.is_struct(kind) and max(kind.get_field_index("bytes"), kind.get_field_index("path")) >= 0
    return is_struct or _is_text(kind) or _is_bytes(kind) or pa.types.is_null(kind)


def is_list(kind: pa.DataType) -> bool:
    """Whether it is one of the types of lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
