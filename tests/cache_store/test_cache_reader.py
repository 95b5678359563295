"""A cache being read: rows by key in any order, few shards in memory, nothing unverified, and errors that help."""

from __future__ import annotations

import multiprocessing
import pickle
import threading
import weakref
from dataclasses import replace

import numpy as np
import pytest
from cache_samples import (
    SPEC,
    commit,
    fill,
    flip,
    full_cache,
    in_process,
    key_of,
    keys_array,
    make_row,
    make_store,
    overwrite,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkd.cache_store.errors import CorruptRecordError, CorruptShardError, MissingRowError
from alignkd.cache_store.protocol import reader as reader_module
from alignkd.cache_store.protocol.names import object_names, record_name
from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.cache_store.storage import open_storage

SAMPLES = [i for i in range(10) if i != 4]


@pytest.fixture
def cache(tmp_path):
    full_cache(tmp_path, shard_samples=3)
    return tmp_path


@pytest.fixture(scope="module")
def long_cache(tmp_path_factory):
    """Ten shards of two samples."""
    return fill(make_store(tmp_path_factory.mktemp("long"), samples=20, shard_samples=2), reject=(4,)).url


def token_ids(reader: CacheReader, i: int) -> list[int]:
    return reader.row(key_of(i)).values["token_ids"].tolist()


def shards(cache) -> list[str]:
    return object_names(open_storage(cache))


def test_rows_are_read_in_any_order_from_any_storage_in_any_format(url, shard_format):
    full_cache(url, shard_samples=3, shard_format=shard_format)
    reader = CacheReader(url)
    assert (len(reader), reader.shard_format, reader.spec) == (9, shard_format, SPEC)
    order = [9, 0, 5, 0, 8, 1]
    for i, row in zip(order, reader.rows(map(key_of, order)), strict=True):
        assert (row.key, row.sample_id) == (key_of(i), f"sample-{i}/é")
        assert row.values["token_ids"].tolist() == make_row(i).values["token_ids"].tolist()
        assert row.values["mass"] == make_row(i).values["mass"]


def test_keys_come_in_the_order_of_the_plan_without_the_rejected(cache):
    reader = CacheReader(cache)
    assert list(reader) == [key_of(i) for i in SAMPLES]
    assert reader.fingerprint == SPEC.fingerprint
    assert reader.rejected[key_of(4)].reason == "too long"
    assert [key in reader for key in (key_of(0), key_of(4), key_of(99), "nonsense", 7)] == [True, *[False] * 4]


def test_single_fields_are_decoded_alone(cache):
    reader = CacheReader(cache)
    assert reader.row(key_of(1), {"mass"}).values.keys() == {"mass"}
    assert [row.values.keys() for row in reader.rows([key_of(1)], ("mass", "vision"))] == [{"mass", "vision"}]


def test_opening_a_reader_opens_no_shard(cache):
    for name in shards(cache):
        (cache / name).unlink()
    reader = CacheReader(cache)
    assert key_of(0) in reader
    with pytest.raises(CorruptShardError, match="it is missing"):
        reader.row(key_of(0))


@settings(max_examples=12, deadline=None)
@given(
    picked=st.lists(st.sampled_from([i for i in range(20) if i != 4]), max_size=15),
    max_shards=st.integers(1, 5),
)
def test_rows_come_exactly_in_the_order_asked_for(long_cache, picked, max_shards):
    rows = CacheReader(long_cache, max_shards=max_shards).rows(map(key_of, picked))
    assert [row.key for row in rows] == [key_of(i) for i in picked]


@settings(max_examples=30, deadline=None)
@given(picked=st.lists(st.integers(0, 25), max_size=30), done=st.sets(st.integers(0, 9)))
def test_shards_of_says_where_each_committed_sample_is(long_cache, picked, done):
    reader = CacheReader(long_cache)
    reader.records = {number: reader.records[number] for number in sorted(done)}
    expected = [i // 2 if i < 20 and i // 2 in done else -1 for i in picked]
    assert reader.shards_of(keys_array(26)[picked]).tolist() == expected
    rows = [key_of(i) in reader for i in picked]
    assert rows == [i // 2 in done and i != 4 for i in picked]


class Counted:
    """Stands for ``open_shard``; knows how many shards are being opened or still alive, and how many ever were."""

    def __init__(self) -> None:
        self.real, self.lock = reader_module.open_shard, threading.Lock()
        self.alive: weakref.WeakSet = weakref.WeakSet()
        self.opening, self.most, self.opened = 0, 0, []

    def __call__(self, storage, spec, record, keys, **kwargs):
        with self.lock:
            self.opening += 1
            self.opened.append(record.number)
            self.most = max(self.most, self.opening + len(self.alive))
        shard = self.real(storage, spec, record, keys, **kwargs)
        with self.lock:
            self.opening -= 1
            self.alive.add(shard)
        return shard


@pytest.fixture
def counted(monkeypatch):
    spy = Counted()
    monkeypatch.setattr(reader_module, "open_shard", spy)
    return spy


@pytest.mark.parametrize("max_shards", [1, 2, 4])
def test_never_more_shards_in_memory_than_allowed(long_cache, counted, max_shards):
    reader = CacheReader(long_cache, max_shards=max_shards)
    order = np.random.default_rng(0).permutation([i for i in range(20) if i != 4]).tolist()
    assert sum(1 for _ in reader.rows(map(key_of, order))) == 19
    for i in order[:5]:
        reader.prefetch(range(10))
        reader.prefetch([i // 2, (i // 2 + 3) % 10])
        reader.row(key_of(i))
    # Wait for every shard that was begun: a thread that is still fetching would be counted by the next test.
    assert sum(1 for _ in reader.rows(map(key_of, order))) == 19
    assert len(set(counted.opened)) == 10
    assert counted.most == max_shards


def test_the_shards_used_last_stay_in_memory(long_cache, counted):
    reader = CacheReader(long_cache, max_shards=2)
    for i in (0, 1, 2, 0, 5, 0, 2):
        reader.row(key_of(i))
    assert counted.opened == [0, 1, 2, 1]


def test_reading_in_order_opens_each_shard_once(long_cache, counted):
    reader = CacheReader(long_cache, max_shards=3)
    assert [row.key for row in reader.rows(reader)] == list(reader)
    assert sorted(counted.opened) == list(range(10))


def test_the_next_shard_is_fetched_while_this_one_is(long_cache, monkeypatch):
    real, together = reader_module.open_shard, threading.Barrier(2)

    def pairwise(storage, spec, record, keys, **kwargs):
        # Nobody gets on until two are being fetched at the same time.
        together.wait(30)
        return real(storage, spec, record, keys, **kwargs)

    monkeypatch.setattr(reader_module, "open_shard", pairwise)
    reader = CacheReader(long_cache, max_shards=4)
    assert [row.key for row in reader.rows(reader)] == list(reader)


def test_a_missing_row_says_why(cache):
    store = make_store(cache.parent / "partial", samples=10, shard_samples=3)
    commit(store, 0)
    with pytest.raises(MissingRowError, match=r"'sample-4/é' was rejected .* too long"):
        CacheReader(cache).row(key_of(4))
    with pytest.raises(MissingRowError, match="planned for shard 2, which was not committed yet; run alignkd cache-teacher"):
        CacheReader(store.url).row(key_of(7))
    for key in (key_of(99), "nonsense"):
        with pytest.raises(MissingRowError, match=rf"{key}.*never planned"):
            CacheReader(cache).shard_of(key)
    assert str(MissingRowError("no row\nhere")) == "no row\nhere"


@pytest.mark.parametrize("key", [key_of(4), key_of(99), "nonsense"])
def test_rows_names_the_one_that_is_missing_before_it_reads_any(cache, counted, key):
    with pytest.raises(MissingRowError, match=key):
        next(CacheReader(cache).rows([key_of(0), key]))
    assert counted.opened == []


def test_find_gives_the_keys_of_a_sample_id(cache):
    reader = CacheReader(cache, max_shards=1)
    assert reader.find("sample-7/é") == [key_of(7)]
    assert reader.find("sample-4/é") == [key_of(4)]
    assert reader.find("nobody") == []


@pytest.mark.parametrize("where", [0.0, 0.3, 0.6, 1.0])
def test_a_flipped_bit_is_refused_and_shard_samples_and_way_out_are_named(tmp_path, shard_format, where):
    storage = full_cache(tmp_path, shard_samples=3, shard_format=shard_format)
    name = object_names(storage)[0]
    flip(storage, name, where)
    reader = CacheReader(tmp_path)
    for _ in range(2):
        with pytest.raises(CorruptShardError, match=rf"shard 0 .*{name}.*crc32.*3 samples \({key_of(0)}.*alignkd cache repair"):
            reader.row(key_of(1))
    assert token_ids(reader, 3) == make_row(3).values["token_ids"].tolist()


def test_a_damaged_shard_that_was_fetched_ahead_harms_no_other(cache):
    flip(open_storage(cache), shards(cache)[1])
    rows = CacheReader(cache).rows(map(key_of, SAMPLES))
    assert [next(rows).key for _ in range(3)] == [key_of(i) for i in range(3)]
    with pytest.raises(CorruptShardError, match="shard 1 "):
        next(rows)


def test_a_shard_that_could_not_be_read_is_tried_again_when_it_is_asked_for_again(cache):
    reader, name = CacheReader(cache), shards(cache)[0]
    (cache / name).rename(cache / "away")
    with pytest.raises(CorruptShardError):
        reader.row(key_of(0))
    (cache / "away").rename(cache / name)
    assert reader.row(key_of(0)).key == key_of(0)


def test_a_truncated_shard_is_refused(cache):
    file = cache / shards(cache)[0]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CorruptShardError, match="bytes, expected"):
        CacheReader(cache).row(key_of(0))


def test_a_shard_in_the_place_of_another_is_refused_even_where_its_record_fits(tmp_path, shard_format):
    store = fill(make_store(tmp_path, samples=2, shard_samples=1, shard_format=shard_format))
    _, second = store.status().records.values()
    moved = second.object.replace("000001", "000000")
    store.storage.write(moved, store.storage.read(second.object))
    forged = replace(second, number=0, object=moved)
    overwrite(store.storage, record_name(0), forged.to_json().encode())
    with pytest.raises(CorruptShardError, match="its keys are not those of plan and record"):
        CacheReader(tmp_path).row(key_of(0))


def test_a_damaged_record_is_refused_with_what_to_do(cache):
    flip(open_storage(cache), record_name(1))
    with pytest.raises(CorruptRecordError, match=r"000001.json.*Run this, then cache-teacher again: alignkd cache repair"):
        CacheReader(cache)


def test_a_record_in_the_place_of_another_is_refused(cache):
    (cache / record_name(1)).write_bytes((cache / record_name(0)).read_bytes())
    with pytest.raises(CorruptRecordError, match="record of shard 0"):
        CacheReader(cache)


def test_a_reader_is_pickled_without_its_shards(cache):
    reader = CacheReader(cache)
    assert key_of(8) in reader
    empty = len(pickle.dumps(reader))
    expected = token_ids(reader, 8)
    assert len(pickle.dumps(reader)) == empty
    assert token_ids(pickle.loads(pickle.dumps(reader)), 8) == expected


def _read(reader: CacheReader, samples: list[int]) -> list[list[int]]:
    return [row.values["token_ids"].tolist() for row in reader.rows(map(key_of, samples))]


@pytest.mark.parametrize(("method", "shard_format"), [("fork", "webdataset"), ("fork", "zarr"), ("spawn", "zarr")])
def test_a_reader_that_was_used_works_in_another_process(tmp_path, method, shard_format):
    reader = CacheReader(full_cache(tmp_path, shard_samples=3, shard_format=shard_format).url, max_shards=2)
    expected = _read(reader, [0, 3, 8])
    reader.prefetch(range(4))
    assert in_process(method, _read, reader, [0, 3, 8]) == expected
    assert _read(reader, [9, 1]) == [make_row(i).values["token_ids"].tolist() for i in (9, 1)]


def _send(results, reader: CacheReader, worker: int) -> None:
    results.put((worker, _read(reader, SAMPLES[worker::3])))


@pytest.mark.processes
def test_many_workers_read_object_storage_at_once(s3_url):
    full_cache(s3_url, shard_samples=3)
    reader, context = CacheReader(s3_url), multiprocessing.get_context("fork")
    reader.row(key_of(0))
    results = context.SimpleQueue()
    workers = [context.Process(target=_send, args=(results, reader, worker)) for worker in range(3)]
    for worker in workers:
        worker.start()
    found = dict(results.get() for _ in workers)
    for worker in workers:
        worker.join(60)
    assert found == {worker: _read(reader, SAMPLES[worker::3]) for worker in range(3)}


def test_fewer_than_one_shard_in_memory_is_refused(cache):
    with pytest.raises(ValueError, match="at least 1"):
        CacheReader(cache, max_shards=0)
