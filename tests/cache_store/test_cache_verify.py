"""The audit finds every kind of damage, and its digest says what a cache holds, not how."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cache_samples import fill, flip, keys_array, make_row, make_rows, make_store, shard_files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alignkd.cache_store.commit import read_records, record_path
from alignkd.cache_store.store import CacheStore
from alignkd.cache_store.verify import verify

# Another value means that caches written before can no longer be compared: raise FORMAT_VERSION.
CONTENT_SHA256 = "1822e9d23f175c35bb0f6e72006bfe28f40e458a7aee81168757aaff54009fcf"


@pytest.fixture
def cache(tmp_path):
    return fill(make_store(tmp_path), reject=(4,)).path


def test_a_sound_cache_has_no_problems(cache):
    report = verify(cache)
    assert (report.problems, report.rows, report.rejected, report.strays) == ([], 9, 1, 0)
    assert (report.shards_done, report.shards_planned, report.incomplete) == (3, 3, 0)


def test_a_cache_that_is_not_finished_is_incomplete_not_damaged(tmp_path):
    make_store(tmp_path).commit_shard(1, make_rows(4, first=4), [])
    report = verify(tmp_path)
    assert (report.problems, report.rows, report.incomplete) == ([], 4, 2)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), name=st.sampled_from(["shards", "commits"]))
def test_a_flipped_bit_anywhere_is_found(cache, where, name):
    file = sorted((cache / name).iterdir())[1]
    before = file.read_bytes()
    flip(file, int(where * (len(before) - 1)))
    report = verify(cache)
    file.write_bytes(before)
    assert len(report.problems) == 1
    assert "1" in report.problems[0]
    assert report.rows == 6


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", ["shards", "commits"])
@pytest.mark.parametrize("damage", ["truncated", "empty"])
def test_truncation_is_found_in_a_quick_audit_too(cache, name, damage, quick):
    file = sorted((cache / name).iterdir())[0]
    file.write_bytes(file.read_bytes()[:-2] if damage == "truncated" else b"")
    report = verify(cache, quick=quick)
    assert len(report.problems) == 1
    assert file.name in report.problems[0]


@pytest.mark.parametrize("quick", [False, True])
def test_a_lost_shard_is_found(cache, quick):
    shard_files(cache)[2].unlink()
    report = verify(cache, quick=quick)
    assert len(report.problems) == 1
    assert "shard 2" in report.problems[0]


def test_strangers_are_found(cache):
    names = ["shards/notes.txt", "shards/000007-0123456789ab.zarr.zip", "commits/readme"]
    for name in names:
        (cache / name).write_bytes(b"x")
    problems = verify(cache).problems
    assert len(problems) == 3
    assert all(any(problem.startswith(name) for problem in problems) for name in names)


def test_a_shard_that_is_not_in_the_plan_is_found(cache):
    record = read_records(cache)[0]
    outside = replace(record, number=7, object=record.object.replace("000000", "000007"))
    record_path(cache, 7).write_text(outside.to_json())
    (problem,) = verify(cache).problems
    assert "shard 7 is committed but not in the plan of 3 shards" in problem


def test_a_record_of_other_samples_than_planned_is_found(cache):
    record = read_records(cache)[0]
    record_path(cache, 0).write_text(replace(record, keys=record.keys[:-1]).to_json())
    (problem,) = verify(cache).problems
    assert "samples of the plan" in problem


def test_a_quick_audit_reads_no_shard_and_gives_no_digest(cache):
    file = shard_files(cache)[0]
    flip(file, 100)
    report = verify(cache, quick=True)
    assert (report.problems, report.rows, report.content_sha256) == ([], 9, "")


def test_the_digest_does_not_depend_on_shards_or_order(tmp_path):
    one = verify(fill(make_store(tmp_path / "one", samples=6, shard_samples=2)).path).content_sha256
    two = CacheStore.create_or_open(
        tmp_path / "two", make_store(tmp_path / "one", 6, 2).spec, keys_array(6)[::-1], shard_samples=5, plan_meta={}
    )
    two.commit_shard(1, [make_row(0)], [])
    two.commit_shard(0, [make_row(i) for i in (3, 1, 2, 5, 4)], [])
    assert verify(two.path).content_sha256 == one


def test_the_digest_depends_on_every_value(tmp_path):
    digests = set()
    for name in ("none", *make_row(1).values):
        store = make_store(tmp_path / name, samples=2)
        rows = make_rows(2)
        if name != "none":
            rows[1] = replace(rows[1], values={**rows[1].values, name: rows[1].values[name] * 2})
        store.commit_shard(0, rows, [])
        digests.add(verify(store.path).content_sha256)
    # int8-rows stores doubled values with the same codes: the scales tell them apart.
    assert len(digests) == 5


def test_the_digest_stays_what_it_was(tmp_path):
    values = {
        "attention": np.linspace(0, 1, 12, dtype=np.float32).reshape(2, 3, 2),
        "vision": np.linspace(-3, 3, 8, dtype=np.float32).reshape(2, 4),
        "token_ids": np.arange(3, dtype=np.int32),
        "mass": np.array(0.25, dtype=np.float32),
    }
    store = make_store(tmp_path, samples=1)
    store.commit_shard(0, [replace(make_row(0), values=values)], [])
    assert verify(tmp_path).content_sha256 == CONTENT_SHA256
