"""A cache in another format holds the same rows to the last bit, however often the conversion was stopped."""

from __future__ import annotations

import pytest
from cache_samples import all_names, commit, contents, flip, full_cache, key_of, make_store

from alignkd.cache_store.codecs import get_codec
from alignkd.cache_store.errors import CorruptShardError, FingerprintMismatchError
from alignkd.cache_store.protocol.maintenance.convert import convert, other_format
from alignkd.cache_store.protocol.maintenance.verify import verify
from alignkd.cache_store.protocol.names import object_names
from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.cache_store.protocol.store import open_store


def data_of(storage) -> dict[str, bytes]:
    """Everything but the records, which keep their time, and the runs, which are not converted."""
    return {name: data for name, data in contents(storage).items() if not name.startswith(("commits/", "runs/"))}


def bits(row) -> dict:
    return {name: (value.dtype, value.shape, value.tobytes()) for name, value in row.values.items()}


def test_there_and_back_gives_the_same_content_and_the_same_bytes(tmp_path, shard_format):
    source = full_cache(tmp_path / "a", shard_format=shard_format)
    there = convert(source.url, tmp_path / "b")
    assert there.manifest.shard_format == other_format(shard_format) != shard_format
    back = convert(there.url, tmp_path / "c")
    reports = [verify(url) for url in (source.url, there.url, back.url)]
    assert len({report.content_sha256 for report in reports}) == 1
    assert all((r.problems, r.strays, r.rows, r.rejected) == ([], [], 9, 1) for r in reports)
    assert data_of(back.storage) == data_of(source)
    assert open_store(back.url).status().records == open_store(source.url).status().records


def test_a_converted_row_is_the_same_to_the_last_bit(tmp_path):
    source = full_cache(tmp_path / "a")
    one, two = CacheReader(source.url), CacheReader(convert(source.url, tmp_path / "b").url)
    assert list(one) == list(two)
    assert one.rejected == two.rejected
    for a, b in zip(one.rows(one), two.rows(two), strict=True):
        assert (a.key, a.sample_id, a.image_sha256) == (b.key, b.sample_id, b.image_sha256)
        assert bits(a) == bits(b)


def test_no_row_is_decoded(tmp_path, monkeypatch):
    source = full_cache(tmp_path / "a")

    def fail(*_args):
        raise AssertionError("decoded")

    for field in open_store(source.url).spec.fields:
        monkeypatch.setattr(type(get_codec(field.codec)), "decode", fail)
    with pytest.raises(AssertionError, match="decoded"):
        CacheReader(source.url).row(key_of(0))
    assert convert(source.url, tmp_path / "b").pending() == []


@pytest.mark.slow
def test_a_conversion_goes_to_object_storage_and_back(tmp_path, s3_url):
    source = full_cache(tmp_path / "a")
    convert(source.url, s3_url)
    back = convert(s3_url, tmp_path / "b")
    assert data_of(back.storage) == data_of(source)


def test_a_stopped_conversion_goes_on_where_it_was(tmp_path):
    source = full_cache(tmp_path / "a")

    def stop() -> None:
        raise KeyboardInterrupt

    for left in ([1, 2], [2]):
        with pytest.raises(KeyboardInterrupt):
            convert(source.url, tmp_path / "b", on_shard=stop)
        assert open_store(tmp_path / "b").pending() == left
    before = contents(open_store(tmp_path / "b").storage)
    done = []
    store = convert(source.url, tmp_path / "b", on_shard=lambda: done.append(1))
    assert (len(done), store.pending()) == (1, [])
    assert before.items() <= contents(store.storage).items()
    assert verify(store.url).content_sha256 == verify(source.url).content_sha256


def test_what_is_committed_is_converted_and_the_rest_later(tmp_path):
    store = make_store(tmp_path / "a")
    commit(store, 1)
    target = convert(store.url, tmp_path / "b")
    assert target.pending() == [0, 2]
    commit(store, 0)
    assert convert(store.url, tmp_path / "b").pending() == [2]


def test_the_same_format_makes_a_copy(tmp_path, shard_format):
    source = full_cache(tmp_path / "a", shard_format=shard_format)
    copy = convert(source.url, tmp_path / "b", shard_format)
    assert data_of(copy.storage) == data_of(source)


@pytest.mark.parametrize("change", [{"samples": 9}, {"shard_samples": 5}])
def test_another_cache_at_the_target_is_refused_and_left_alone(tmp_path, change):
    source = full_cache(tmp_path / "a")
    target = make_store(tmp_path / "b", shard_format="zarr", **change)
    commit(target, 0)
    before = contents(target.storage)
    with pytest.raises(FingerprintMismatchError, match="Write to another --cache"):
        convert(source.url, target.url)
    assert contents(target.storage) == before


def test_a_cache_is_not_converted_into_its_own_place(tmp_path):
    source = full_cache(tmp_path / "a")
    with pytest.raises(FingerprintMismatchError, match='format: cache has "webdataset", wanted "zarr"'):
        convert(source.url, source.url)


def test_a_damaged_shard_is_refused_and_nothing_after_it_is_half_done(tmp_path):
    source = full_cache(tmp_path / "a")
    flip(source, object_names(source)[1])
    with pytest.raises(CorruptShardError, match="shard 1 "):
        convert(source.url, tmp_path / "b")
    assert (verify(tmp_path / "b").problems, open_store(tmp_path / "b").pending()) == ([], [1, 2])


def test_where_no_cache_is_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="no cache at"):
        convert(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_an_unknown_format_is_refused_before_anything_is_written(tmp_path):
    source = full_cache(tmp_path / "a")
    with pytest.raises(ValueError, match="unknown shard format"):
        convert(source.url, tmp_path / "b", "parquet")
    assert not (tmp_path / "b").exists()
    assert all_names(source)
