"""The Zarr format: the shared suite, and what only a zip of Zarr arrays can get wrong."""

from __future__ import annotations

import io
import json
import time
import zipfile
from collections.abc import Callable

import numpy as np
import pytest
from cache_samples import SPEC, key_of, make_rows
from shard_conformance import ShardConformance, packed

from alignkd.cache_store.errors import CorruptShardError
from alignkd.cache_store.formats import webdataset_shard, zarr_array, zarr_shard
from alignkd.cache_store.rows.row import Row
from alignkd.cache_store.rows.spec import CacheSpec, FieldSpec

Files = dict[str, bytes]


class TestZarrShard(ShardConformance):
    format = zarr_shard


def written(count: int = 4) -> bytes:
    return zarr_shard.write_shard(packed(SPEC, make_rows(count)))


def rewritten(change: Callable[[Files], object], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A valid shard, unzipped, changed, and zipped again with checksums that match."""
    with zipfile.ZipFile(io.BytesIO(written())) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    change(files)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def set_meta(node: str, **values: object) -> Callable[[Files], None]:
    def change(files: Files) -> None:
        meta = {**json.loads(files[f"{node}/zarr.json"]), **values}
        files[f"{node}/zarr.json"] = json.dumps(meta, sort_keys=True, separators=(",", ":")).encode()

    return change


def replace_array(name: str, values: np.ndarray) -> Callable[[Files], None]:
    def change(files: Files) -> None:
        files[f"{name}/zarr.json"] = zarr_array.array_json(values.shape, values.dtype)
        files[f"{name}/{zarr_array.shard_name(values.shape)}"] = zarr_array.encode(values)

    return change


def poke(member: str, at: int, value: bytes) -> Callable[[Files], None]:
    def change(files: Files) -> None:
        changed = bytearray(files[member])
        start = at if at >= 0 else len(changed) + at
        changed[start : start + len(value)] = value
        files[member] = bytes(changed)

    return change


def index_array(*entries: object) -> np.ndarray:
    return np.frombuffer(json.dumps(entries).encode(), np.uint8)


def test_a_shard_rewritten_unchanged_is_read():
    assert len(zarr_shard.read_shard(SPEC, rewritten(dict))) == 4


@pytest.mark.parametrize(
    "change",
    [
        set_meta("mass/values", shape=[1 << 60]),
        set_meta("mass/values", shape=[3]),
        set_meta("mass/values", data_type="float16"),
        set_meta("mass/values", codecs=[{"name": "bytes", "configuration": {"endian": "little"}}]),
        set_meta("mass/values", codecs=[{"name": "numcodecs.pickle"}]),
        set_meta("mass/values", attributes={"x": 1}),
        set_meta("mass", attributes={"dims": [], "dtype": "float64", "codec": "exact"}),
        set_meta("_index", shape=[1 << 40]),
        set_meta("_index", shape=[-1]),
        set_meta("_index", shape=[True]),
        set_meta("_index", shape=["1"]),
        set_meta("_index", shape=[]),
        replace_array("token_ids/shape", np.array([[1 << 30], [-1], [0], [0]], "<i4")),
        replace_array("token_ids/shape", np.full((4, 1), (1 << 31) - 1, "<i4")),
        replace_array("attention/shape", np.full((4, 3), (1 << 31) - 1, "<i4")),
        replace_array("mass/values_offsets", np.array([0, 1, 2, 2, 4], "<i8")),
        replace_array("vision/value_of_row", np.array([0, 1, 2, 3], "<i4")),
        replace_array("vision/value_of_row", np.array([0, 2, 2, 1], "<i4")),
        replace_array("vision/value_of_row", np.array([0, 1, 1, 2, 3], "<i4")),
        replace_array("mass/value_of_row", np.array([0, 1, 2, 3], "<i4")),
        lambda files: files.pop("vision/value_of_row/c/0"),
        replace_array("_index", index_array()),
        replace_array("_index", index_array(["../../etc", "x", ""])),
        replace_array("_index", index_array(*([key_of(0), "x", ""] for _ in range(4)))),
        lambda files: files.pop("zarr.json"),
        lambda files: files.pop("mass/values/c/0"),
        lambda files: files.update({"../../outside": b"x"}),
        lambda files: files.update({"mass/values/c/1": b"x" * 16}),
        lambda files: files.update({"mass/values/c/0": files["_index/c/0"]}),
        lambda files: files.update({"mass/values/c/0": files["mass/values/c/0"] + b"\0"}),
        lambda files: files.update({"mass/values/c/0": b"\0" * 10}),
        poke("mass/values/c/0", -1, b"\0\0"),
        poke("mass/values/c/0", -20, b"\xff" * 16),
        poke("mass/values/c/0", -20, (1).to_bytes(8, "little")),
        poke("mass/values/c/0", -12, (1 << 63).to_bytes(8, "little")),
        poke("mass/values/c/0", 12, (1 << 30).to_bytes(4, "little")),
    ],
)
def test_a_shard_that_lies_about_itself_is_refused(change):
    with pytest.raises(CorruptShardError):
        zarr_shard.read_shard(SPEC, rewritten(change))


def test_a_decompression_bomb_is_refused_before_it_is_decompressed():
    data = rewritten(poke("attention/codes/c/0", 4, (1 << 31).to_bytes(4, "little")))
    with pytest.raises(CorruptShardError, match="array 'attention/codes': a Blosc frame declares"):
        zarr_shard.read_shard(SPEC, data)


def test_a_compressed_archive_is_refused():
    with pytest.raises(CorruptShardError, match="more bytes than it has"):
        zarr_shard.read_shard(SPEC, rewritten(lambda files: files.update(big=bytes(1 << 20)), zipfile.ZIP_DEFLATED))


def test_bytes_do_not_depend_on_the_time_of_day(monkeypatch):
    first = written()
    monkeypatch.setattr(time, "time", lambda: 1e9)
    assert written() == first


@pytest.mark.parametrize("values", [np.random.default_rng(0).random(50_001, np.float32), np.zeros(50_001, np.float32)])
def test_arrays_of_several_chunks_come_back_and_give_the_same_bytes(monkeypatch, values):
    monkeypatch.setattr(zarr_array, "CHUNK_BYTES", 1 << 16)
    spec = CacheSpec((FieldSpec("x", ("N",), "float32", "exact"),), {})
    shard = packed(spec, [Row(key_of(i), "", "", {"x": values}) for i in range(3)])
    data = zarr_shard.write_shard(shard)
    read = zarr_shard.read_shard(spec, data)
    assert all(np.array_equal(read.row(i).values["x"], values) for i in range(3))
    assert zarr_shard.write_shard(read) == data


def test_shards_of_one_format_become_shards_of_the_other_and_back():
    rows = packed(SPEC, make_rows(5))
    as_zarr, as_tar = zarr_shard.write_shard(rows), webdataset_shard.write_shard(rows)
    assert webdataset_shard.write_shard(zarr_shard.read_shard(SPEC, as_zarr)) == as_tar
    assert zarr_shard.write_shard(webdataset_shard.read_shard(SPEC, as_tar)) == as_zarr
