"""What every shard format promises; a test class inherits this and says which format it tests."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import pickle
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from cache_samples import SPEC, key_of, make_row, make_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from reference.codec_errors import error_bound

from alignkd.cache_store.codecs import get_codec
from alignkd.cache_store.errors import CorruptShardError
from alignkd.cache_store.formats.contract import ShardFormat
from alignkd.cache_store.formats.registry import get_format
from alignkd.cache_store.rows.encode import concatenate_rows, encode_row
from alignkd.cache_store.rows.row import Row, RowId
from alignkd.cache_store.rows.shard import ColumnShard, Shard
from alignkd.cache_store.rows.spec import CacheSpec, FieldSpec


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


IMAGE_SPEC = CacheSpec(
    (
        FieldSpec("tokens", ("V", "D"), "float32", "int8-rows", per_image=True),
        FieldSpec("mean", (), "float32", "exact", per_image=True),
        FieldSpec("ids", ("T",), "int32", "exact"),
    ),
    {},
)


def image_rows(images: Sequence[str]) -> list[Row]:
    """A row an image name ("" for none); values of one image have one shape, and other last bits in every row."""
    return [_image_row(i, image) for i, image in enumerate(images)]


def _image_row(i: int, image: str) -> Row:
    rng, tokens = np.random.default_rng(i), 1 + len(image) % 3 if image else 0
    values = {
        "tokens": np.full((tokens, 4), 1 + len(image) + i * 1e-3, np.float32),
        "mean": np.array(len(image) + i * 1e-3, np.float32),
        "ids": rng.integers(0, 99, i % 3, np.int32),
    }
    return Row(key_of(i), f"sample-{i}", image.rjust(64, "0") if image else "", values)


def first_of_image(images: Sequence[str], i: int) -> int:
    """The row whose per-image values row ``i`` has."""
    return images.index(images[i]) if images[i] else i


def packed(spec: CacheSpec, rows: Sequence[Row]) -> Shard:
    return concatenate_rows(spec, [encode_row(spec, row) for row in rows])


def values_of(shard: Shard) -> list[tuple[str, bytes]]:
    rows = [shard.row(i) for i in range(len(shard))]
    return [(row.key, value.tobytes()) for row in rows for value in row.values.values()]


def values_in(format_name: str, data: bytes) -> list[tuple[str, bytes]]:
    return values_of(get_format(format_name).read_shard(SPEC, data))


class ShardConformance:
    format: ShardFormat

    def write(self, rows: Sequence[Row], spec: CacheSpec = SPEC) -> bytes:
        return self.format.write_shard(packed(spec, rows))

    def read_all(self, data: bytes, spec: CacheSpec = SPEC) -> None:
        """Everything that is read of a shard: what is damaged may show early or late."""
        shard = self.format.read_shard(spec, data)
        self.format.audit(data, shard)
        values_of(shard)

    def assert_within_bound(self, spec: CacheSpec, written: Row, read: Row) -> None:
        assert (read.key, read.sample_id, read.image_sha256) == (written.key, written.sample_id, written.image_sha256)
        assert read.values.keys() == written.values.keys()
        for field in spec.fields:
            was, now = written.values[field.name], read.values[field.name]
            assert (now.shape, now.dtype) == (was.shape, was.dtype)
            assert (np.abs(now.astype("f8") - was.astype("f8")) <= error_bound(field.codec, was)).all()

    @settings(max_examples=15, deadline=None)
    @given(rows=any_rows())
    def test_rows_come_back_within_the_codecs_bound(self, rows):
        data = self.write(rows, ANY_SPEC)
        shard = self.format.read_shard(ANY_SPEC, data)
        self.format.audit(data, shard)
        assert shard.keys == tuple(row.key for row in rows)
        for i, row in enumerate(rows):
            self.assert_within_bound(ANY_SPEC, row, shard.row(i))

    @settings(max_examples=15, deadline=None)
    @given(rows=any_rows())
    def test_shapes_are_read_from_a_part_of_the_file(self, rows):
        file = io.BytesIO(self.write(rows, ANY_SPEC))
        for field in ANY_SPEC.fields:
            shapes = self.format.read_shapes(ANY_SPEC, file, len(rows), field.name)
            assert [tuple(shape) for shape in shapes.tolist()] == [row.values[field.name].shape for row in rows]

    def test_shapes_of_what_is_no_shard_or_has_other_rows_are_refused(self):
        data = self.write(make_rows(5))
        name = next(field.name for field in SPEC.fields if field.dims and not field.per_image)
        for damaged, rows in ((data, 4), (data, 6), (b"", 5), (data[:300] + bytes(len(data) - 300), 5)):
            with pytest.raises(CorruptShardError):
                self.format.read_shapes(SPEC, io.BytesIO(damaged), rows, name)

    def test_encoded_parts_are_those_of_the_codec(self):
        rows = make_rows(5)
        shard = self.format.read_shard(SPEC, self.write(rows))
        for i, row in enumerate(rows):
            for field in SPEC.fields:
                expected = get_codec(field.codec).encode(row.values[field.name])
                found = shard.encoded(i)[field.name]
                assert found.keys() == expected.keys()
                assert all(np.array_equal(found[part], expected[part].reshape(-1)) for part in expected)

    @settings(max_examples=25, deadline=None)
    @given(images=st.lists(st.sampled_from(["", "a", "bb", "ccc", "dddd"]), max_size=8))
    def test_rows_of_one_image_have_the_first_ones_values_and_all_others_their_own(self, images):
        rows = image_rows(images)
        data = self.write(rows, IMAGE_SPEC)
        shard = self.format.read_shard(IMAGE_SPEC, data)
        self.format.audit(data, shard)
        for i, row in enumerate(rows):
            first = rows[first_of_image(images, i)]
            expected = replace(row, values={**first.values, "ids": row.values["ids"]})
            self.assert_within_bound(IMAGE_SPEC, expected, shard.row(i))
            parts = shard.encoded(i)
            assert np.array_equal(parts["mean"]["values"], [first.values["mean"]])
            assert np.array_equal(parts["ids"]["values"], row.values["ids"])
        firsts = [row for i, row in enumerate(rows) if first_of_image(images, i) == i]
        stored = {"tokens": firsts, "mean": firsts, "ids": rows}
        assert shard.decoded_bytes() == {name: sum(r.values[name].nbytes for r in kept) for name, kept in stored.items()}
        assert self.format.write_shard(shard) == data

    def test_an_image_takes_as_much_room_for_many_rows_as_for_one(self):
        spec = CacheSpec((FieldSpec("x", ("N",), "float32", "exact", per_image=True),), {})

        def size(images: list[str]) -> int:
            values = [{"x": np.random.default_rng(i).random(20_000, np.float32)} for i in range(len(images))]
            data = self.write([Row(key_of(i), "", image, values[i]) for i, image in enumerate(images)], spec)
            return self.format.field_bytes(spec, data)["x"]

        one, two = size(["a" * 64]), size(["a" * 64, "b" * 64])
        assert one > 60_000
        assert size(["a" * 64] * 30) - one < 2_000
        assert size(["a" * 64, "b" * 64] * 15) - two < 2_000
        assert size([""] * 30) > 25 * one

    def test_two_shapes_for_one_image_are_refused_with_both_samples(self):
        one, other, two = image_rows(["a", "bb", "a"])
        longer = replace(two, values={**two.values, "tokens": np.zeros((9, 4), np.float32)})
        with pytest.raises(ValueError, match=r"'tokens' is stored once.*'sample-0'.*'sample-2'.*\[2, 4\] and \[9, 4\]"):
            self.write([one, other, longer], IMAGE_SPEC)
        self.write([one, other, replace(longer, image_sha256="f" * 64)], IMAGE_SPEC)

    def test_a_key_is_never_taken_for_the_hash_of_an_image(self):
        one, two = image_rows(["", "a"])
        data = self.write([one, replace(two, image_sha256=one.key)], IMAGE_SPEC)
        assert self.format.read_shard(IMAGE_SPEC, data).row(1).values["mean"] == two.values["mean"]

    def test_the_same_rows_give_the_same_bytes(self):
        assert self.write(make_rows(5)) == self.write(make_rows(5))

    def test_a_shard_that_was_read_is_written_as_it_was(self):
        data = self.write(make_rows(5))
        assert self.format.write_shard(self.format.read_shard(SPEC, data)) == data

    def test_the_order_of_the_fields_does_not_matter(self):
        turned = CacheSpec(SPEC.fields[::-1], SPEC.fingerprint)
        data = self.write(make_rows(5))
        assert self.write(make_rows(5), turned) == data
        self.read_all(data, turned)

    def test_a_shard_without_rows_is_a_shard(self):
        data = self.write([])
        self.read_all(data)
        assert len(self.format.read_shard(SPEC, data)) == 0

    def test_a_decoded_row_can_be_written_into_without_changing_the_shard(self):
        shard = self.format.read_shard(SPEC, self.write([make_row(1)]))
        before = shard.row(0).values["token_ids"].copy()
        shard.row(0).values["token_ids"][:] = -1
        assert np.array_equal(shard.row(0).values["token_ids"], before)

    def test_a_shard_crosses_fork_and_pickle(self):
        data = self.write(make_rows(5))
        shard = self.format.read_shard(SPEC, data)
        expected = values_of(shard)
        assert values_of(pickle.loads(pickle.dumps(shard))) == expected
        with multiprocessing.get_context("fork").Pool(1) as pool:
            assert pool.apply_async(values_of, (shard,)).get(timeout=60) == expected
            assert pool.apply_async(values_in, (self.format.NAME, data)).get(timeout=60) == expected

    def test_bytes_by_field_fit_into_the_file(self):
        data = self.write(make_rows(5))
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
            self.write([replace(make_row(1), values=values)])

    def test_every_truncation_is_refused(self):
        data = self.write(make_rows(2))
        for length in [*range(0, len(data), max(1, len(data) // 40)), len(data) - 1]:
            with pytest.raises(CorruptShardError):
                self.format.read_shard(SPEC, data[:length])

    def test_a_flipped_bit_gives_a_corrupt_shard_or_a_shard_and_no_other_error(self):
        data = self.write(make_rows(2))
        for at in range(0, len(data), max(1, len(data) // 200)):
            changed = bytearray(data)
            changed[at] ^= 0x10
            with contextlib.suppress(CorruptShardError):
                self.read_all(bytes(changed))

    @settings(max_examples=50, deadline=None)
    @given(data=st.binary(max_size=200))
    def test_any_other_bytes_are_refused(self, data):
        with pytest.raises(CorruptShardError):
            self.format.read_shard(SPEC, data)

    def test_more_than_a_shard_may_hold_is_refused(self, monkeypatch):
        data = self.write(make_rows(5))
        monkeypatch.setenv("ALIGNKD_MAX_DECODED_GIB", "0.0000001")
        with pytest.raises(CorruptShardError, match=r"at most 107 are read: .*set ALIGNKD_MAX_DECODED_GIB=1$"):
            self.format.read_shard(SPEC, data)

    def test_shapes_that_numpy_cannot_have_are_refused(self):
        spec = CacheSpec((FieldSpec("x", ("A", "B", "C"), "float32", "float16"),), {})
        huge, nothing = np.array([[0, (1 << 31) - 1, (1 << 31) - 1]], np.int32), np.empty(0, "<f2")
        shard = ColumnShard(spec, [RowId(key_of(0), "", "")], {"x": huge}, {"x": {"values": nothing}})
        with pytest.raises(CorruptShardError, match="field 'x' has a shape"):
            self.format.read_shard(spec, self.format.write_shard(shard))

    @pytest.mark.parametrize(
        "fields",
        [
            SPEC.fields[:-1],
            (*SPEC.fields, FieldSpec("more", (), "float32", "exact")),
            (*SPEC.fields[:-1], FieldSpec("mass", (), "float64", "exact")),
            (*SPEC.fields[:-1], FieldSpec("mass", ("T",), "float32", "exact")),
            (*SPEC.fields[:-1], FieldSpec("mass", (), "float32", "float16")),
            (*SPEC.fields[:-1], FieldSpec("mass", (), "float32", "exact", per_image=True)),
        ],
        ids=["fewer", "more", "dtype", "dims", "codec", "per image"],
    )
    def test_a_shard_of_other_fields_is_refused(self, fields):
        with pytest.raises(CorruptShardError):
            self.format.read_shard(CacheSpec(fields, {}), self.write(make_rows(3)))
