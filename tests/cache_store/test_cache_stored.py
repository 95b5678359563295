"""Rows as they are stored: what is decoded elsewhere is what ``row`` decodes here."""

from __future__ import annotations

import numpy as np
import pytest
from cache_samples import SPEC, fill, key_of, make_store

from alignkd.cache_store.codecs import get_codec
from alignkd.cache_store.errors import MissingRowError
from alignkd.cache_store.protocol.reader import CacheReader


@pytest.fixture(params=["zarr", "webdataset"])
def reader(request, tmp_path):
    return CacheReader(fill(make_store(tmp_path / "cache", shard_format=request.param), reject=(4,)).url)


def test_stored_parts_are_in_shape_and_decode_to_what_the_row_holds(reader):
    fields = [field.name for field in SPEC.fields]
    for key in reader:
        row, stored = reader.row(key), reader.encoded_fields(key, fields)
        assert list(stored) == fields
        for name, value in stored.items():
            layout = get_codec(value.field.codec).layout(value.shape, value.field.numpy_dtype)
            assert {part: (a.shape, a.dtype) for part, a in value.parts.items()} == layout
            decoded = get_codec(value.field.codec).decode(value.parts, value.shape)
            assert value.shape == row.values[name].shape
            assert np.array_equal(decoded, row.values[name])


def test_only_the_fields_asked_for_are_given(reader):
    stored = reader.encoded_fields(key_of(1), ["attention"])
    assert list(stored) == ["attention"]
    assert stored["attention"].field == next(field for field in SPEC.fields if field.name == "attention")


def test_a_rejected_sample_has_nothing_stored(reader):
    with pytest.raises(MissingRowError, match="was rejected"):
        reader.encoded_fields(key_of(4), ["attention"])
