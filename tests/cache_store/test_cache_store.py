"""A cache being written: whole shards, resume, refusal, many workers at once, and what a crash may leave behind."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from dataclasses import replace

import numpy as np
import pytest
from cache_samples import (
    SPEC,
    TENSORS,
    all_names,
    commit,
    contents,
    fill,
    flip,
    full_cache,
    key_of,
    make_row,
    make_rows,
    make_store,
)

from alignkd.cache_store.errors import CorruptRecordError, FingerprintMismatchError
from alignkd.cache_store.protocol.commit import read_records
from alignkd.cache_store.protocol.maintenance.verify import verify
from alignkd.cache_store.protocol.names import object_names, record_name
from alignkd.cache_store.protocol.record import CommitRecord
from alignkd.cache_store.protocol.store import CacheStore, open_store
from alignkd.cache_store.rows.encode import encode_row
from alignkd.cache_store.rows.row import Rejected
from alignkd.cache_store.rows.spec import CacheSpec
from alignkd.cache_store.storage.local import LocalStorage


@pytest.mark.slow
def test_a_cache_is_written_resumed_and_read_on_any_storage_in_any_format(url, shard_format):
    store = make_store(url, shard_format=shard_format)
    assert store.pending() == [0, 1, 2]
    commit(store, 1)
    resumed = make_store(url, shard_format=shard_format)
    assert resumed.pending() == [0, 2]
    assert (resumed.committed(1), resumed.committed(0)) == (True, False)
    report = verify(fill(resumed, reject=(0,)).url)
    assert (report.problems, report.strays, report.rows, report.rejected, report.incomplete) == ([], [], 9, 1, 0)
    assert open_store(url).pending() == []


def test_an_interrupted_cache_ends_like_an_uninterrupted_one(tmp_path):
    whole, resumed = fill(make_store(tmp_path / "a")), make_store(tmp_path / "b")
    resumed.commit_shard(2, make_rows(2, first=8)[::-1], [])
    fill(make_store(tmp_path / "b"))
    assert object_names(whole.storage) == object_names(resumed.storage)
    assert verify(whole.url).content_sha256 == verify(resumed.url).content_sha256


@pytest.mark.parametrize("at", ["tensors/head", "plan/keys", "cache.json", "shards/000000", "commits/000000"])
@pytest.mark.parametrize("written", [False, True])
def test_a_crash_at_any_write_leaves_a_shard_or_none(tmp_path, monkeypatch, at, written):
    real = LocalStorage._write

    def crash(self, path, data):
        if str(path).startswith(f"{tmp_path}/{at}"):
            # A killed process cleans nothing up.
            path.parent.mkdir(parents=True, exist_ok=True)
            (path.parent / ".tmp-0123456789abcdef").write_bytes(data[:10])
            raise KeyboardInterrupt(real(self, path, data) if written else None)
        return real(self, path, data)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "_write", crash)
        with pytest.raises(KeyboardInterrupt):
            commit(make_store(tmp_path, tensors=TENSORS), 0)
    store = make_store(tmp_path, tensors=TENSORS)
    assert store.pending() == ([1, 2] if at == "commits/000000" and written else [0, 1, 2])
    assert verify(tmp_path).problems == []
    fill(store)
    assert [name.split("/")[-1] for name in store.sweep(min_age_s=0)] == [".tmp-0123456789abcdef"]
    report = verify(tmp_path)
    assert (report.problems, report.strays, report.rows) == ([], [], 10)


def test_sweeping_keeps_committed_shards_strangers_and_what_is_younger_than_asked(tmp_path):
    store = fill(make_store(tmp_path))
    for name in ("shards/notes.txt", "shards/000001-0123456789ab.tar", "plan/.tmp-0123456789abcdef"):
        store.storage.write(name, b"left over")
    before = set(all_names(store.storage))
    assert store.sweep(min_age_s=3600) == []
    swept = store.sweep(min_age_s=0)
    assert sorted(swept) == ["plan/.tmp-0123456789abcdef", "shards/000001-0123456789ab.tar"]
    assert before - set(all_names(store.storage)) == set(swept)
    assert store.sweep(min_age_s=0) == []


def test_what_a_damaged_record_may_name_is_not_swept(tmp_path):
    store = fill(make_store(tmp_path))
    flip(store.storage, record_name(1))
    assert store.sweep(min_age_s=0) == []
    store.storage.write("shards/000001-0123456789ab.tar", b"which of the two was recorded?")
    with pytest.raises(CorruptRecordError):
        store.sweep(min_age_s=0)
    assert len(object_names(store.storage)) == 4


def test_what_is_swept_was_not_committed_in_the_meantime(tmp_path, monkeypatch):
    store, other = make_store(tmp_path), make_store(tmp_path)
    commit(store, 0)
    store.storage.delete(record_name(0))
    record = None

    def late(self, name):
        nonlocal record
        record = record or commit(other, 0)
        return 1e6

    monkeypatch.setattr(LocalStorage, "age_s", late)
    assert store.sweep(min_age_s=3600) == []
    assert verify(tmp_path).problems == []


def test_what_was_swept_within_a_commit_is_written_again(tmp_path, monkeypatch):
    store = make_store(tmp_path)
    commit(store, 0)
    store.storage.delete(record_name(0))
    real = LocalStorage.write

    def swept(self, name, data):
        if name == record_name(0):
            self.delete(object_names(self)[0])
        return real(self, name, data)

    monkeypatch.setattr(LocalStorage, "write", swept)
    commit(store, 0)
    assert (verify(tmp_path).problems, verify(tmp_path).rows) == ([], 4)


@pytest.mark.parametrize("keep_size", [True, False])
def test_a_damaged_leftover_is_not_taken_for_the_shard(tmp_path, keep_size):
    store = make_store(tmp_path)
    name = commit(store, 0).object
    store.storage.delete(record_name(0))
    data = store.storage.read(name)
    flip(store.storage, name)
    if not keep_size:
        (tmp_path / name).write_bytes(data[:-1])
    commit(store, 0)
    assert store.storage.read(name) == data
    assert verify(tmp_path).problems == []


@pytest.mark.parametrize("same", [True, False])
def test_the_second_commit_of_a_shard_is_discarded(tmp_path, same):
    store = make_store(tmp_path)
    first = commit(store, 0, worker="first")
    before = contents(store.storage)
    rows = make_rows(4) if same else [replace(row, sample_id="other") for row in make_rows(4)]
    assert store.commit_shard(0, rows, [], worker="second") == first
    assert contents(store.storage) == before


@pytest.mark.parametrize("same", [True, False])
def test_two_workers_that_write_one_shard_at_once_leave_it_whole(tmp_path, monkeypatch, same):
    one, two = make_store(tmp_path), make_store(tmp_path)
    # Both look before either writes: the worst order.
    monkeypatch.setattr(CacheStore, "committed", lambda self, number: False)
    rows = make_rows(4) if same else [replace(row, sample_id="other") for row in make_rows(4)]
    first = one.commit_shard(0, rows, [], worker="one")
    assert commit(two, 0, worker="two") == first
    report = verify(tmp_path)
    assert (report.problems, report.rows, report.strays) == ([], 4, [])
    assert object_names(one.storage) == [first.object]


def test_rows_that_are_not_those_of_the_plan_are_our_own_mistake(tmp_path):
    store = make_store(tmp_path)
    for rows in (make_rows(3), make_rows(5), make_rows(4, first=1), [make_row(0)] * 4):
        with pytest.raises(AssertionError):
            store.commit_shard(0, rows, [])
    with pytest.raises(AssertionError):
        store.commit_shard(0, make_rows(4), [Rejected(key_of(0), "sample-0", "both")])
    assert store.pending() == [0, 1, 2]


def test_a_refused_row_commits_nothing(tmp_path):
    store = make_store(tmp_path)
    rows = make_rows(4)
    rows[2] = replace(rows[2], values={**rows[2].values, "vision": np.full((1, 4), np.inf, np.float32)})
    with pytest.raises(ValueError, match="sample-2"):
        store.commit_shard(0, rows, [])
    assert store.pending() == [0, 1, 2]


def test_rows_that_are_encoded_already_give_the_same_shard(tmp_path):
    one, two = commit(make_store(tmp_path / "a"), 0), make_store(tmp_path / "b")
    encoded = [encode_row(SPEC, row) for row in make_rows(4)]
    assert replace(two.commit_shard(0, encoded, [], seconds=1.5, tokens=100), finished=one.finished) == one


def test_a_shard_of_rejected_samples_alone_is_committed_empty(tmp_path, shard_format):
    store = fill(make_store(tmp_path, shard_format=shard_format), reject=(0, 1, 2, 3, 5))
    report = verify(tmp_path)
    assert (report.problems, report.rows, report.rejected) == ([], 5, 5)
    assert store.status().rejected[0] == Rejected(key_of(0), "sample-0/é", "too long")


def test_status_adds_up_the_records(tmp_path):
    store = make_store(tmp_path)
    assert store.status().shards_done == 0
    status = fill(store, reject=(1,)).status()
    assert status.complete
    assert (status.shards_done, status.shards) == (3, 3)
    assert (status.samples_done, len(status.rejected), status.samples) == (9, 1, 10)
    assert status.total_bytes == sum(store.storage.size(name) for name in object_names(store.storage))
    assert set(status.bytes_by_field) == {field.name for field in SPEC.fields}
    assert status.decoded_bytes_by_field["mass"] == 4 * 9
    assert (status.seconds, status.tokens) == (4.5, 300)


def test_a_run_is_kept_once_under_a_name_that_proves_its_content(tmp_path):
    storage = full_cache(tmp_path)
    (name,) = (name for name in all_names(storage) if name.startswith("runs/"))
    again = open_store(tmp_path).write_run({"versions": {"alignkd": "0"}, "seed": 1})
    assert again == name == f"runs/{hashlib.sha256(storage.read(name)).hexdigest()[:16]}.json"
    assert json.loads(storage.read(name)) == {"seed": 1, "versions": {"alignkd": "0"}}
    assert open_store(tmp_path).write_run({"seed": 2}) != name


def test_another_fingerprint_is_refused(tmp_path):
    make_store(tmp_path)
    other = CacheSpec(SPEC.fields, {**SPEC.fingerprint, "top_k": 9})
    with pytest.raises(FingerprintMismatchError, match="top_k: cache has 8, wanted 9"):
        make_store(tmp_path, spec=other)


def test_commits_without_a_manifest_are_not_adopted(url):
    store = make_store(url)
    commit(store, 0)
    store.storage.delete("cache.json")
    with pytest.raises(ValueError, match=r"committed shards but no cache.json"):
        make_store(url)


def _work(barrier, results, url, top_k, worker) -> None:
    barrier.wait(60)
    try:
        store = make_store(url, samples=24, spec=CacheSpec(SPEC.fields, {"top_k": top_k}))
        fill(store)
        results.put((top_k, hashlib.sha256(store.storage.read("cache.json")).hexdigest()))
    except FingerprintMismatchError as error:
        results.put((top_k, str(error)))


def race(url, top_ks: list[int]) -> list[tuple[int, str]]:
    """What processes get that start the same cache at the same time."""
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(len(top_ks)), context.SimpleQueue()
    workers = [context.Process(target=_work, args=(barrier, results, url, k, i)) for i, k in enumerate(top_ks)]
    for worker in workers:
        worker.start()
    found = [results.get() for _ in workers]
    for worker in workers:
        worker.join(60)
    return found


def test_processes_that_start_at_once_agree_on_one_cache_and_fill_it(tmp_path):
    found = race(tmp_path, [8] * 4)
    assert len(set(found)) == 1
    report = verify(tmp_path)
    assert (report.problems, report.strays, report.rows) == ([], [], 24)


@pytest.mark.slow
def test_processes_agree_on_object_storage_too(s3_url):
    assert len(set(race(s3_url, [8, 8]))) == 1
    report = verify(s3_url)
    assert (report.problems, report.strays, report.rows) == ([], [], 24)


def test_of_two_settings_that_start_at_once_one_wins_and_the_other_is_told(tmp_path):
    found = dict(race(tmp_path, [8, 9]))
    (won,) = (top_k for top_k, answer in found.items() if len(answer) == 64)
    assert f"top_k: cache has {won}, wanted {17 - won}" in found[17 - won]
    assert open_store(tmp_path).spec.fingerprint == {"top_k": won}


def test_a_record_comes_back_and_every_damaged_character_is_found(tmp_path):
    (record,) = read_records(fill(make_store(tmp_path, samples=2), reject=(1,)).storage).values()
    text = record.to_json()
    assert CommitRecord.from_json(text) == record
    with pytest.raises(CorruptRecordError, match="its checksum does not match"):
        CommitRecord.from_json(text.replace('"rows":1', '"rows":2'))
    for at in range(len(text) - 1):
        with pytest.raises(CorruptRecordError):
            CommitRecord.from_json(text[:at] + chr(ord(text[at]) ^ 1) + text[at + 1 :])
        with pytest.raises(CorruptRecordError):
            CommitRecord.from_json(text[:at])


@pytest.mark.parametrize("name", ["../../secret", "shards/../../000000-0123456789ab.zarr", "/etc/passwd", 7])
def test_a_record_cannot_name_a_file_outside_the_cache(tmp_path, name):
    store = make_store(tmp_path)
    text = replace(commit(store, 0), object=name).to_json()
    with pytest.raises(CorruptRecordError):
        CommitRecord.from_json(text)
