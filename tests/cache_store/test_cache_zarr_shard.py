"""The Zarr format: the shared suite, and what only a zip of Zarr arrays can get wrong."""

from __future__ import annotations

import io
import json
import os
import time
import zipfile
from collections.abc import Callable

import numpy as np
import pytest
import zarr
from cache_samples import SPEC, make_rows
from shard_conformance import ShardConformance

from alignkd.cache_store import zarr_compat, zarr_shard
from alignkd.cache_store.shard import CorruptShard
from alignkd.cache_store.spec import CacheSpec, FieldSpec

Files = dict[str, bytes]


class TestZarrShard(ShardConformance):
    format = zarr_shard


def rewritten(change: Callable[[Files], object], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A valid shard, unzipped, changed, and zipped again with checksums that match."""
    with zipfile.ZipFile(io.BytesIO(zarr_shard.write_shard(SPEC, make_rows(4)))) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    change(files)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def set_meta(array: str, **values: object) -> Callable[[Files], None]:
    def change(files: Files) -> None:
        files[f"{array}/.zarray"] = json.dumps({**json.loads(files[f"{array}/.zarray"]), **values}).encode()

    return change


def replace_array(name: str, values: np.ndarray) -> Callable[[Files], None]:
    def change(files: Files) -> None:
        written = zarr_compat.write_group({name: values})
        files.update({path: data for path, data in written.items() if path.startswith(name)})

    return change


def test_a_shard_rewritten_unchanged_is_read():
    assert len(zarr_shard.read_shard(SPEC, rewritten(dict))) == 4


@pytest.mark.parametrize(
    "change",
    [
        set_meta("mass.values", shape=[1 << 60]),
        set_meta("mass.values", shape=[3]),
        set_meta("index", shape=[1 << 40]),
        set_meta("index", shape=[1 << 40], chunks=[1 << 40]),
        set_meta("index", shape=[-1]),
        set_meta("index", chunks=[0]),
        set_meta("mass.values", dtype="|O"),
        set_meta("mass.values", filters=[{"id": "pickle"}]),
        set_meta("mass.values", compressor={"id": "pickle"}),
        set_meta("mass.values", compressor=None),
        replace_array("token_ids.shape", np.array([1 << 30, -1, 0, 0], "<i4")),
        replace_array("token_ids.shape", np.full(4, (1 << 31) - 1, "<i4")),
        replace_array("attention.shape", np.full(12, (1 << 31) - 1, "<i4")),
        replace_array("index", np.frombuffer(b"[]", np.uint8)),
        replace_array("index", np.frombuffer(b'[["../../etc","x",""]]', np.uint8)),
        lambda files: files.pop("mass.values/0"),
        lambda files: files.update({"../../outside": b"x"}),
        lambda files: files.update({"mass.values/1": b"x" * 16}),
        lambda files: files.update({"mass.values/0": files["index/0"]}),
    ],
)
def test_a_shard_that_lies_about_itself_is_refused(change):
    with pytest.raises(CorruptShard):
        zarr_shard.read_shard(SPEC, rewritten(change))


def test_a_decompression_bomb_is_refused_before_it_is_decompressed():
    def change(files: Files) -> None:
        header = bytearray(files["index/0"][:16])
        header[4:8] = (1 << 31).to_bytes(4, "little")
        files["index/0"] = bytes(header) + files["index/0"][16:]

    with pytest.raises(CorruptShard, match="index/0"):
        zarr_shard.read_shard(SPEC, rewritten(change))


def test_a_compressed_archive_is_refused():
    with pytest.raises(CorruptShard, match="more bytes than it has"):
        zarr_shard.read_shard(SPEC, rewritten(lambda files: files.update(big=bytes(1 << 20)), zipfile.ZIP_DEFLATED))


def test_bytes_do_not_depend_on_the_time_of_day(monkeypatch):
    first = zarr_shard.write_shard(SPEC, make_rows(3))
    monkeypatch.setattr(time, "time", lambda: 1e9)
    assert zarr_shard.write_shard(SPEC, make_rows(3)) == first


def test_arrays_of_several_chunks_come_back_and_give_the_same_bytes(monkeypatch):
    monkeypatch.setattr(zarr_compat, "CHUNK_BYTES", 1 << 16)
    spec = CacheSpec((FieldSpec("x", ("N",), "float32", "exact"),), {})
    rows = [
        type(row)(row.key, row.sample_id, row.image_sha256, {"x": np.random.default_rng(0).random(50_000, np.float32)})
        for row in make_rows(3)
    ]
    data = zarr_shard.write_shard(spec, rows)
    shard = zarr_shard.read_shard(spec, data)
    assert all(np.array_equal(shard.row(i).values["x"], rows[i].values["x"]) for i in range(3))
    assert zarr_shard.write_shard(spec, rows) == data


def test_zarr_alone_reads_a_shard_from_its_file(tmp_path):
    rows = make_rows(4)
    path = tmp_path / "shard.zarr.zip"
    path.write_bytes(zarr_shard.write_shard(SPEC, rows))
    store = zarr.storage.ZipStore(os.fspath(path), mode="r")
    found = zarr.open_group(store, mode="r")["token_ids.values"][...]
    store.close()
    assert np.array_equal(found, np.concatenate([row.values["token_ids"] for row in rows]))
