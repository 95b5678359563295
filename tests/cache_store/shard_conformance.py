"""What every shard format promises; a test class inherits this and says which format it tests."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cache_samples import SPEC, key_of, make_row, make_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from alignkd.cache_store.codecs import get_codec
from alignkd.cache_store.row import Row
from alignkd.cache_store.shard import CorruptShard, ShardFormat
from alignkd.cache_store.spec import CacheSpec, FieldSpec


def ragged(name: str, dims: int, dtype: str, codec: str) -> st.SearchStrategy[tuple[FieldSpec, st.SearchStrategy]]:
    floats = {"allow_nan": False, "allow_infinity": False, "min_value": -60000, "max_value": 60000, "width": 32}
    shapes = hnp.array_shapes(min_dims=dims, max_dims=dims, min_side=0, max_side=4) if dims else st.just(())
    elements = st.floats(**floats) if dtype == "float32" else None
    return FieldSpec(name, tuple("ABCD"[:dims]), dtype, codec), hnp.arrays(dtype, shapes, elements=elements)


FIELDS = [
    ragged("scalar", 0, "float32", "float16"),
    ragged("vector", 1, "float32", "int8-rows"),
    ragged("cube", 3, "float32", "int8-rows"),
    ragged("codes", 2, "int64", "exact"),
]
ANY_SPEC = CacheSpec(tuple(field for field, _ in FIELDS), {})


@st.composite
def any_rows(draw: st.DrawFn) -> list[Row]:
    count = draw(st.integers(0, 4))
    ids = st.text(max_size=8)
    return [
        Row(key_of(i), draw(ids), draw(st.sampled_from(["", "c" * 64])), {f.name: draw(v) for f, v in FIELDS})
        for i in range(count)
    ]


class ShardConformance:
    format: ShardFormat

    def assert_within_bound(self, spec: CacheSpec, written: Row, read: Row) -> None:
        assert (read.key, read.sample_id, read.image_sha256) == (written.key, written.sample_id, written.image_sha256)
        assert read.values.keys() == written.values.keys()
        for field in spec.fields:
            was, now = written.values[field.name], read.values[field.name]
            assert (now.shape, now.dtype) == (was.shape, was.dtype)
            assert (np.abs(now.astype("f8") - was.astype("f8")) <= get_codec(field.codec).error_bound(was)).all()

    @settings(max_examples=25, deadline=None)
    @given(rows=any_rows())
    def test_rows_come_back_within_the_codecs_bound(self, rows):
        shard = self.format.read_shard(ANY_SPEC, self.format.write_shard(ANY_SPEC, rows))
        assert len(shard) == len(rows)
        assert shard.keys == tuple(row.key for row in rows)
        for i, row in enumerate(rows):
            self.assert_within_bound(ANY_SPEC, row, shard.row(i))

    def test_encoded_parts_are_those_of_the_codec(self):
        rows = make_rows(5)
        shard = self.format.read_shard(SPEC, self.format.write_shard(SPEC, rows))
        for i, row in enumerate(rows):
            for field in SPEC.fields:
                expected = get_codec(field.codec).encode(row.values[field.name])
                found = shard.encoded(i)[field.name]
                assert found.keys() == expected.keys()
                assert all(np.array_equal(found[part], expected[part].reshape(-1)) for part in expected)

    def test_the_same_rows_give_the_same_bytes(self):
        assert self.format.write_shard(SPEC, make_rows(5)) == self.format.write_shard(SPEC, make_rows(5))

    def test_a_shard_without_rows_is_a_shard(self):
        assert len(self.format.read_shard(SPEC, self.format.write_shard(SPEC, []))) == 0

    def test_a_decoded_row_can_be_written_into_without_changing_the_shard(self):
        shard = self.format.read_shard(SPEC, self.format.write_shard(SPEC, [make_row(1)]))
        before = shard.row(0).values["token_ids"].copy()
        shard.row(0).values["token_ids"][:] = -1
        assert np.array_equal(shard.row(0).values["token_ids"], before)

    def test_bytes_by_field_fit_into_the_file(self):
        data = self.format.write_shard(SPEC, make_rows(5))
        found = self.format.field_bytes(SPEC, data)
        assert found.keys() == {field.name for field in SPEC.fields}
        assert min(found.values()) > 0
        assert sum(found.values()) < len(data)

    @pytest.mark.parametrize("change", ["missing", "dtype", "ndim", "unknown", "nan"])
    def test_a_row_that_does_not_fit_the_spec_is_refused_by_name(self, change):
        values = dict(make_row(1).values)
        if change == "missing":
            del values["mass"]
        else:
            values.update(
                {
                    "dtype": {"token_ids": values["token_ids"].astype("int64")},
                    "ndim": {"mass": np.zeros(1, "float32")},
                    "unknown": {"other": np.zeros(1, "float32")},
                    "nan": {"vision": np.full((1, 4), np.nan, "float32")},
                }[change]
            )
        with pytest.raises(ValueError, match=r"sample-1/é.*field '(mass|token_ids|other|vision)'"):
            self.format.write_shard(SPEC, [replace(make_row(1), values=values)])

    def test_every_truncation_is_refused(self):
        data = self.format.write_shard(SPEC, make_rows(2))
        for length in range(0, len(data), max(1, len(data) // 40)):
            with pytest.raises(CorruptShard):
                self.format.read_shard(SPEC, data[:length])

    def test_a_flipped_bit_gives_a_corrupt_shard_or_a_shard_and_no_other_error(self):
        data = self.format.write_shard(SPEC, make_rows(2))
        for at in range(0, len(data), max(1, len(data) // 150)):
            changed = bytearray(data)
            changed[at] ^= 0x10
            try:
                shard = self.format.read_shard(SPEC, bytes(changed))
            except CorruptShard:
                continue
            for i in range(len(shard)):
                shard.row(i)

    @settings(max_examples=50, deadline=None)
    @given(data=st.binary(max_size=200))
    def test_any_other_bytes_are_refused(self, data):
        with pytest.raises(CorruptShard):
            self.format.read_shard(SPEC, data)

    @pytest.mark.parametrize(
        "fields",
        [
            SPEC.fields[:-1],
            (*SPEC.fields, FieldSpec("more", (), "float32", "exact")),
            (*SPEC.fields[:-1], FieldSpec("mass", (), "float64", "exact")),
            (*SPEC.fields[:-1], FieldSpec("mass", ("T",), "float32", "exact")),
            (*SPEC.fields[:-1], FieldSpec("mass", (), "float32", "float16")),
        ],
        ids=["fewer", "more", "dtype", "dims", "codec"],
    )
    def test_a_shard_of_other_fields_is_refused(self, fields):
        data = self.format.write_shard(SPEC, make_rows(3))
        with pytest.raises(CorruptShard):
            self.format.read_shard(CacheSpec(fields, {}), data)
