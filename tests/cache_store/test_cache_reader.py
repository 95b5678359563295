"""A cache being read: rows by key, few shards in memory, nothing unverified, and errors that help."""

from __future__ import annotations

import multiprocessing
import pickle

import pytest
from cache_samples import SPEC, fill, flip, key_of, make_row, make_rows, make_store, shard_files

from alignkd.cache_store import reader as reader_module
from alignkd.cache_store.commit import CorruptRecord
from alignkd.cache_store.reader import CacheReader, MissingRow
from alignkd.cache_store.shard import CorruptShard


@pytest.fixture
def cache(tmp_path):
    fill(make_store(tmp_path, samples=10, shard_samples=3), reject=(4,))
    return tmp_path


def token_ids(reader: CacheReader, i: int) -> list[int]:
    return reader.row(key_of(i)).values["token_ids"].tolist()


def test_rows_are_found_by_key(cache):
    reader = CacheReader(cache)
    assert len(reader) == 9
    assert list(reader) == [key_of(i) for i in range(10) if i != 4]
    assert (reader.spec, reader.fingerprint) == (SPEC, SPEC.fingerprint)
    for i in (9, 0, 5):
        row = reader.row(key_of(i))
        assert (row.key, row.sample_id) == (key_of(i), f"sample-{i}/é")
        assert token_ids(reader, i) == make_row(i).values["token_ids"].tolist()
        assert reader.shard_of(key_of(i)) == i // 3


def test_opening_a_reader_opens_no_shard(cache):
    for file in shard_files(cache):
        file.unlink()
    reader = CacheReader(cache)
    assert key_of(0) in reader
    assert key_of(4) not in reader
    assert reader.rejected[key_of(4)].reason == "too long"
    with pytest.raises(CorruptShard, match="No such file"):
        reader.row(key_of(0))


def test_few_shards_stay_in_memory_those_used_last(cache, monkeypatch):
    opened, real = [], reader_module.open_shard

    def counted(root, spec, record, *, verify):
        opened.append(record.number)
        return real(root, spec, record, verify=verify)

    monkeypatch.setattr(reader_module, "open_shard", counted)
    reader = CacheReader(cache, max_shards=2)
    for i in (0, 1, 3, 0, 6, 0, 3):
        reader.row(key_of(i))
    assert opened == [0, 1, 2, 1]


def test_a_missing_row_says_why(cache):
    fill_one = make_store(cache.parent / "partial", samples=10, shard_samples=3)
    fill_one.commit_shard(0, make_rows(3), [])
    with pytest.raises(MissingRow, match=r"'sample-4/é' was rejected .* too long"):
        CacheReader(cache).row(key_of(4))
    with pytest.raises(MissingRow, match="planned for shard 2, which was not committed"):
        CacheReader(fill_one.path).row(key_of(7))
    for key in (key_of(99), "nonsense"):
        with pytest.raises(KeyError, match=rf"{key}.*never planned"):
            CacheReader(cache).shard_of(key)
    assert not str(MissingRow("no row")).startswith("'")


def test_find_gives_the_keys_of_a_sample_id(cache):
    reader = CacheReader(cache, max_shards=1)
    assert reader.find("sample-7/é") == [key_of(7)]
    assert reader.find("sample-4/é") == [key_of(4)]
    assert reader.find("nobody") == []


@pytest.mark.parametrize("position", [0.0, 0.3, 0.6, 0.99])
def test_a_flipped_bit_in_a_shard_is_refused_and_the_samples_are_named(cache, position):
    file = shard_files(cache)[0]
    flip(file, int(position * file.stat().st_size))
    with pytest.raises(CorruptShard, match=rf"shard 0 .*{file.name}.*sha256.*{key_of(0)}.*alignkd cache verify"):
        CacheReader(cache).row(key_of(1))
    CacheReader(cache).row(key_of(3))


def test_a_truncated_shard_is_refused_even_without_checksums(cache):
    file = shard_files(cache)[0]
    file.write_bytes(file.read_bytes()[:-1])
    for verify in (True, False):
        with pytest.raises(CorruptShard, match="expected"):
            CacheReader(cache, verify=verify).row(key_of(0))


def test_a_shard_in_the_place_of_another_is_refused_even_without_checksums(tmp_path):
    fill(make_store(tmp_path, samples=2, shard_samples=1))
    first, second = shard_files(tmp_path)
    data = second.read_bytes()
    first.write_bytes(data)
    with pytest.raises(CorruptShard):
        CacheReader(tmp_path, verify=False).row(key_of(0))


def test_a_damaged_record_is_refused_with_what_to_do(cache):
    flip(cache / "commits" / "000001.json", 40)
    with pytest.raises(CorruptRecord, match=r"000001.json.*Delete it and run alignkd cache-teacher"):
        CacheReader(cache)


def test_a_record_in_the_place_of_another_is_refused(cache):
    (cache / "commits" / "000001.json").write_bytes((cache / "commits" / "000000.json").read_bytes())
    with pytest.raises(CorruptRecord, match="record of shard 0"):
        CacheReader(cache)


def test_a_reader_is_pickled_without_its_shards(cache):
    reader = CacheReader(cache)
    empty = len(pickle.dumps(reader))
    expected = token_ids(reader, 8)
    assert len(pickle.dumps(reader)) == empty
    assert token_ids(pickle.loads(pickle.dumps(reader)), 8) == expected


def _send(reader: CacheReader, results: multiprocessing.SimpleQueue) -> None:
    results.put([token_ids(reader, i) for i in (0, 8)])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_reader_that_was_used_works_in_another_process(cache, method):
    context = multiprocessing.get_context(method)
    reader = CacheReader(cache)
    reader.row(key_of(0))
    results = context.SimpleQueue()
    process = context.Process(target=_send, args=(reader, results))
    process.start()
    process.join(30)
    assert process.exitcode == 0
    assert results.get() == [token_ids(reader, 0), token_ids(reader, 8)]


def test_fewer_than_one_shard_in_memory_is_refused(cache):
    with pytest.raises(ValueError, match="at least 1"):
        CacheReader(cache, max_shards=0)
