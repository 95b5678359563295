"""A cache being written: frozen plan, whole shards, resume, refusal, and what a crash may leave behind."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
from cache_samples import SPEC, fill, flip, key_of, keys_array, make_row, make_rows, make_store, shard_files

from alignkd.cache_store import commit as commit_module
from alignkd.cache_store.commit import CommitRecord, CorruptRecord, read_records, write_atomically
from alignkd.cache_store.row import Rejected
from alignkd.cache_store.spec import CacheSpec, FingerprintMismatch
from alignkd.cache_store.store import CacheStore, open_store
from alignkd.cache_store.verify import verify


def test_the_plan_says_which_sample_is_in_which_shard(tmp_path):
    plan = make_store(tmp_path, samples=10, shard_samples=4).plan
    assert (plan.samples, plan.shards) == (10, 3)
    assert [key for shard in range(3) for key in plan.keys_of(shard)] == [key_of(i) for i in range(10)]
    assert [plan.shard_of(key_of(i)) for i in (0, 3, 4, 9, 10)] == [0, 0, 1, 2, None]


def test_pending_is_what_has_no_record(tmp_path):
    store = make_store(tmp_path)
    assert store.pending() == [0, 1, 2]
    store.commit_shard(1, make_rows(4, first=4), [])
    assert make_store(tmp_path).pending() == [0, 2]
    assert fill(make_store(tmp_path)).pending() == []


def test_an_interrupted_cache_ends_like_an_uninterrupted_one(tmp_path):
    whole, resumed = fill(make_store(tmp_path / "a")), make_store(tmp_path / "b")
    resumed.commit_shard(2, make_rows(2, first=8)[::-1], [])
    fill(make_store(tmp_path / "b"))
    assert [f.name for f in shard_files(whole.path)] == [f.name for f in shard_files(resumed.path)]
    assert verify(whole.path).content_sha256 == verify(resumed.path).content_sha256


@pytest.mark.parametrize("crash_at", ["shard", "record"])
def test_a_crash_before_the_record_leaves_nothing_that_exists(tmp_path, monkeypatch, crash_at):
    store, real = make_store(tmp_path), commit_module.os.replace

    def crash(source, target):
        if ("commits" in str(target)) == (crash_at == "record"):
            # A killed process cleans nothing up.
            os.link(source, f"{source}x")
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(commit_module.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        store.commit_shard(0, make_rows(4), [])
    monkeypatch.undo()
    store = make_store(tmp_path)
    assert store.pending() == [0, 1, 2]
    assert verify(tmp_path).problems == []
    assert len(store.sweep()) == (2 if crash_at == "record" else 1)
    assert shard_files(tmp_path) == []
    assert verify(fill(store).path).rows == 10


def test_sweeping_keeps_committed_shards_and_strangers_and_what_is_younger_than_asked(tmp_path):
    store = fill(make_store(tmp_path))
    (tmp_path / "shards" / "notes.txt").write_text("mine")
    stray = tmp_path / "shards" / "000001-0123456789ab.zarr.zip"
    stray.write_bytes(b"left over")
    (tmp_path / "plan" / ".tmp-1").write_bytes(b"")
    assert store.sweep(min_age_s=3600) == []
    assert verify(tmp_path).strays == 1
    assert store.sweep() == ["plan/.tmp-1", "shards/000001-0123456789ab.zarr.zip"]
    assert store.sweep() == []
    assert len(shard_files(tmp_path)) == 4
    assert verify(tmp_path).rows == 10


def test_sweeping_stops_at_a_damaged_record(tmp_path):
    store = fill(make_store(tmp_path))
    flip(tmp_path / "commits" / "000001.json", 30)
    with pytest.raises(CorruptRecord):
        store.sweep()
    assert len(shard_files(tmp_path)) == 3


def test_the_second_commit_of_a_shard_is_discarded(tmp_path):
    store = make_store(tmp_path)
    first = store.commit_shard(0, make_rows(4), [])
    other = [replace(row, sample_id="other") for row in make_rows(4)]
    assert store.commit_shard(0, other, []) == first
    assert len(shard_files(tmp_path)) == 1


def test_two_workers_that_write_one_shard_at_once_leave_it_whole(tmp_path):
    one, two = make_store(tmp_path / "a"), make_store(tmp_path / "b")
    one.commit_shard(0, make_rows(4), [])
    two.commit_shard(0, [replace(row, sample_id="other") for row in make_rows(4)], [])
    # Both objects are in place before either record: the worst order.
    (stranger,) = shard_files(two.path)
    (one.path / "shards" / stranger.name).write_bytes(stranger.read_bytes())
    report = verify(one.path)
    assert (report.problems, report.rows, report.strays) == ([], 4, 1)
    assert len(one.sweep()) == 1


def test_rows_that_are_not_those_of_the_plan_are_our_own_mistake(tmp_path):
    store = make_store(tmp_path)
    for rows in (make_rows(3), make_rows(5), make_rows(4, first=1), [make_row(0)] * 4):
        with pytest.raises(AssertionError):
            store.commit_shard(0, rows, [])
    assert store.pending() == [0, 1, 2]


def test_a_refused_row_commits_nothing(tmp_path):
    store = make_store(tmp_path)
    rows = make_rows(4)
    rows[2] = replace(rows[2], values={**rows[2].values, "vision": np.full((1, 4), np.inf, np.float32)})
    with pytest.raises(ValueError, match="sample-2"):
        store.commit_shard(0, rows, [])
    assert store.pending() == [0, 1, 2]


def test_a_shard_of_rejected_samples_alone_is_committed_empty(tmp_path):
    store = fill(make_store(tmp_path), reject=(0, 1, 2, 3, 5))
    report = verify(tmp_path)
    assert (report.problems, report.rows, report.rejected) == ([], 5, 5)
    assert store.status().rejected[0] == Rejected(key_of(0), "sample-0/é", "too long")


def test_status_adds_up_the_records(tmp_path):
    store = make_store(tmp_path)
    assert store.status().shards_done == 0
    status = fill(store, reject=(1,)).status()
    assert status.complete
    assert (status.shards_done, status.shards) == (3, 3)
    assert (status.samples_done, status.samples_rejected, status.samples) == (9, 1, 10)
    assert status.total_bytes == sum(file.stat().st_size for file in shard_files(tmp_path))
    assert set(status.bytes_by_field) == {field.name for field in SPEC.fields}
    assert status.decoded_bytes_by_field["mass"] == 4 * 9
    assert (status.seconds, status.tokens) == (4.5, 300)


def test_another_fingerprint_is_refused(tmp_path):
    make_store(tmp_path)
    other = CacheSpec(SPEC.fields, {**SPEC.fingerprint, "top_k": 9})
    with pytest.raises(FingerprintMismatch, match="top_k: cache has 8, wanted 9"):
        make_store(tmp_path, spec=other)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"keys": keys_array(10)[::-1]}, "keys_sha256"),
        ({"keys": keys_array(9)}, "samples: cache has 10, wanted 9"),
        ({"shard_samples": 5}, "shard_samples: cache has 4, wanted 5"),
        ({"plan_meta": {"seed": 2}}, "meta.seed: cache has 1, wanted 2"),
    ],
)
def test_another_plan_is_refused(tmp_path, change, named):
    make_store(tmp_path)
    arguments = {"keys": keys_array(10), "shard_samples": 4, "plan_meta": {"seed": 1}, **change}
    with pytest.raises(FingerprintMismatch, match=named):
        CacheStore.create_or_open(tmp_path, SPEC, **arguments)


def test_a_plan_whose_settings_hold_tuples_is_the_same_plan_again(tmp_path):
    for _ in range(2):
        CacheStore.create_or_open(tmp_path, SPEC, keys_array(3), shard_samples=2, plan_meta={"range": (1, 2)})


@pytest.mark.parametrize(
    ("keys", "shard_samples", "message"),
    [
        (keys_array(3)[[0, 1, 0]], 2, "1 of 3 keys are repeated"),
        (keys_array(1)[:0], 2, "without samples"),
        (keys_array(3), 0, "at least 1"),
        (keys_array(3).astype("int32"), 2, "expected uint8"),
    ],
)
def test_a_plan_that_cannot_be_one_is_refused(tmp_path, keys, shard_samples, message):
    with pytest.raises(ValueError, match=message):
        CacheStore.create_or_open(tmp_path / "c", SPEC, keys, shard_samples=shard_samples, plan_meta={})
    assert not (tmp_path / "c").exists()


def test_a_folder_without_a_cache_is_refused_with_what_was_found(tmp_path):
    with pytest.raises(ValueError, match=r"no cache at .*: found nothing, expected cache.json; run alignkd cache"):
        open_store(tmp_path / "none")
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a folder with photo\.jpg"):
        open_store(tmp_path)


def test_commits_without_a_spec_are_not_adopted(tmp_path):
    fill(make_store(tmp_path))
    (tmp_path / "cache.json").unlink()
    with pytest.raises(ValueError, match=r"committed shards but no cache.json"):
        make_store(tmp_path)


@pytest.mark.parametrize("name", ["plan/keys.npy", "plan/plan.json"])
def test_a_damaged_plan_is_refused(tmp_path, name):
    make_store(tmp_path)
    flip(tmp_path / name, (tmp_path / name).stat().st_size - 10)
    with pytest.raises(ValueError, match="the plan of the cache"):
        open_store(tmp_path)


def test_a_plan_with_pickled_objects_is_refused(tmp_path):
    make_store(tmp_path)
    np.save(tmp_path / "plan" / "keys.npy", np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="the plan of the cache"):
        open_store(tmp_path)


def test_a_record_comes_back_and_every_damaged_character_is_found(tmp_path):
    fill(make_store(tmp_path, samples=2), reject=(1,))
    (record,) = read_records(tmp_path).values()
    text = record.to_json()
    assert CommitRecord.from_json(text) == record
    for at in range(len(text) - 1):
        with pytest.raises(CorruptRecord):
            CommitRecord.from_json(text[:at] + chr(ord(text[at]) ^ 1) + text[at + 1 :])
        with pytest.raises(CorruptRecord):
            CommitRecord.from_json(text[:at])


@pytest.mark.parametrize("name", ["../../secret", "shards/../../000000-0123456789ab.zarr.zip", "/etc/passwd", 7])
def test_a_record_cannot_name_a_file_outside_the_cache(tmp_path, name):
    fill(make_store(tmp_path))
    text = replace(read_records(tmp_path)[0], object=name).to_json()
    with pytest.raises(CorruptRecord):
        CommitRecord.from_json(text)


def test_an_atomic_write_that_fails_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch):
    write_atomically(tmp_path / "file", b"old")

    def full(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(commit_module.os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "file", b"new")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_file_and_folder_are_synced_before_and_after_the_rename(tmp_path, monkeypatch):
    calls = []
    real = {name: getattr(os, name) for name in ("fsync", "replace")}
    for name, function in real.items():
        monkeypatch.setattr(os, name, lambda *a, name=name, function=function: (calls.append(name), function(*a)))
    write_atomically(tmp_path / "file", b"data")
    assert calls == ["fsync", "replace", "fsync"]
