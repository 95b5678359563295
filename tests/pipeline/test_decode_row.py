"""The rows of a cache's tar shards stream in anyone's pipeline: ``wds.WebDataset(shards).map(alignkd.decode_row)``."""

from __future__ import annotations

import functools
import json
import pickle
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest
import webdataset as wds
from tiny_runs import SAMPLES, write_cache, write_data

import alignkd
from alignkd.cache_store.protocol.maintenance.convert import convert
from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.pipeline.cache_admin import webdataset_rows
from alignkd.pipeline.cache_admin.row import row_arrays

ABOUT = {"__key__", "id", "image_sha256"}


@pytest.fixture(scope="module")
def tar_cache(cache, tmp_path_factory):
    """A cache of attention, vision tokens and logits, in tar shards."""
    return convert(cache, tmp_path_factory.mktemp("rows") / "tar").url


@pytest.fixture(scope="module")
def shared_images(tmp_path_factory):
    """One shard in which an image serves several samples: its values are stored with the first."""
    folder = tmp_path_factory.mktemp("shared")
    again = [{**record, "id": f"{record['id']}-{i}"} for i in range(2) for record in SAMPLES]
    write_cache(write_data(folder / "data.json", again), folder / "cache", shard_format="webdataset", shard_samples=64)
    return folder / "cache"


def shards(cache):
    return sorted(str(path) for path in (Path(cache) / "shards").glob("*.tar"))


def rows_of(urls, decode=alignkd.decode_row, shuffle=0):
    stream = wds.WebDataset(urls, shardshuffle=False)
    return list((stream.shuffle(shuffle) if shuffle else stream).map(decode))


def assert_as_inspected(rows, cache):
    reader = CacheReader(cache)
    assert sorted(row["__key__"] for row in rows) == sorted(reader)
    for row in rows:
        stored = reader.row(row["__key__"])
        expected = row_arrays(reader, stored)
        assert (row["id"], row["image_sha256"]) == (stored.sample_id, stored.image_sha256)
        assert row.keys() - ABOUT == expected.keys()
        for name, array in expected.items():
            assert (row[name].dtype, row[name].shape) == (array.dtype, array.shape)
            assert np.array_equal(row[name], array)


@pytest.fixture(autouse=True)
def nothing_remembered():
    webdataset_rows._kept.__dict__.clear()
    webdataset_rows._opened_shard.cache_clear()


def test_every_row_has_the_arrays_that_inspect_shows(tar_cache):
    assert_as_inspected(rows_of(shards(tar_cache)), tar_cache)


def test_rows_that_share_an_image_have_its_values_in_order_and_shuffled(shared_images, monkeypatch):
    opened = []
    read_alone = webdataset_rows.read_alone
    monkeypatch.setattr(webdataset_rows, "read_alone", lambda data: opened.append(len(data)) or read_alone(data))
    assert_as_inspected(rows_of(shards(shared_images)), shared_images)
    assert opened == []  # in order no shard is read twice
    webdataset_rows._kept.__dict__.clear()
    backwards = list(reversed(list(wds.WebDataset(shards(shared_images), shardshuffle=False))))
    assert_as_inspected([alignkd.decode_row(sample) for sample in backwards], shared_images)
    assert len(opened) == 1


def test_what_a_pipeline_writes_into_one_row_is_not_in_the_next(shared_images):
    expected = {row["__key__"]: row["vision_tokens_VD"] for row in rows_of(shards(shared_images))}
    for sample in wds.WebDataset(shards(shared_images), shardshuffle=False):
        row = alignkd.decode_row(sample)
        assert np.array_equal(row["vision_tokens_VD"], expected[row["__key__"]])
        row["vision_tokens_VD"][:] = 0


def test_workers_of_a_loader_decode_rows(shared_images):
    loader = wds.WebLoader(
        wds.WebDataset(shards(shared_images), shardshuffle=False).map(alignkd.decode_row), num_workers=1, batch_size=None
    )
    rows = [{name: np.asarray(value) if name not in ABOUT else value for name, value in row.items()} for row in loader]
    assert_as_inspected(rows, shared_images)
    assert pickle.loads(pickle.dumps(alignkd.decode_row)) is alignkd.decode_row


def test_a_cache_on_a_store_is_found_from_the_url_of_its_shard(shared_images):
    store = fsspec.filesystem("memory")
    store.put(str(shared_images), "/decode-row", recursive=True)
    (path,) = shards(shared_images)
    url = f"memory://decode-row/shards/{path.rsplit('/', 1)[1]}"
    samples = [{**sample, "__url__": url} for sample in wds.WebDataset(path, shardshuffle=False)]
    assert_as_inspected([alignkd.decode_row(sample) for sample in reversed(samples)], shared_images)


def test_shards_that_lie_alone_need_the_cache_named(shared_images, tmp_path):
    (path,) = shards(shared_images)
    alone = str(shutil.copy(path, tmp_path / "alone.tar"))
    with pytest.raises(alignkd.AlignkdError, match="map functools"):
        rows_of(alone)
    assert_as_inspected(rows_of(alone, functools.partial(alignkd.decode_row, cache=shared_images)), shared_images)
    assert_as_inspected(
        rows_of(f"pipe:cat {alone}", functools.partial(alignkd.decode_row, cache=str(shared_images))), shared_images
    )


def test_a_row_whose_images_went_by_in_a_pipe_says_what_to_do(shared_images):
    (path,) = shards(shared_images)
    last = list(wds.WebDataset(f"pipe:cat {path}", shardshuffle=False))
    shared = next(sample for sample in last if b"null" in sample["json"])
    with pytest.raises(alignkd.AlignkdError, match="before shuffling"):
        alignkd.decode_row({**shared, "__url__": "pipe:cat shard"}, cache=shared_images)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda sample: {"__key__": "a", "png": b"x"}, "expected the members json and blosc"),
        (lambda sample: {**sample, "json": b"{"}, "not a row"),
        (lambda sample: {**sample, "json": b"[" * 100 + b"]" * 100}, "depth"),
        (lambda sample: {**sample, "blosc": sample["blosc"][:-1]}, "bytes of frames"),
        (lambda sample: {**sample, "__key__": "../escape"}, "something other than keys"),
        (lambda sample: resized(sample, "labels", [1 << 40]), "not a row|values"),
        (lambda sample: resized(sample, "labels", [-1]), "negative"),
        (lambda sample: resized(sample, "labels", [1 << 29]), "declares"),
        (lambda sample: {**sample, "blosc": bytes(len(sample["blosc"]))}, "Blosc"),
    ],
)
def test_a_damaged_or_forged_row_is_one_message(shared_images, change, words):
    sample = next(iter(wds.WebDataset(shards(shared_images), shardshuffle=False)))
    with pytest.raises(alignkd.AlignkdError, match=words):
        alignkd.decode_row(change(sample))


def resized(sample, field, shape):
    described = json.loads(sample["json"])
    described["fields"][field][2] = shape
    return {**sample, "json": json.dumps(described).encode()}
