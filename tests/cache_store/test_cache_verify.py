"""The audit finds every kind of damage and names the affected samples; its digest depends on the content alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cache_samples import (
    SPEC,
    all_names,
    commit,
    fill,
    flip,
    full_cache,
    key_of,
    make_row,
    make_rows,
    make_store,
    plan_of,
)
from damages import DAMAGES, NOTES

from alignkd.cache_store.errors import CorruptShardError
from alignkd.cache_store.formats import webdataset_shard
from alignkd.cache_store.protocol.maintenance.verify import Problem, verify
from alignkd.cache_store.protocol.names import object_name, object_names, record_name
from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.cache_store.protocol.store import CacheStore, open_store
from alignkd.cache_store.storage.local import LocalStorage

# Another value means that caches written before can no longer be compared: raise FORMAT_VERSION.
CONTENT_SHA256 = "a869aa34925ff7d208acd4be9105a3139a93a821c9fc9f1e171da93e3405983a"


def keys_of(shard: int | None) -> tuple[str, ...]:
    return () if shard is None else tuple(key_of(i) for i in range(4 * shard, min(4 * shard + 4, 10)))


def test_a_sound_cache_has_no_problems(tmp_path, shard_format):
    report = verify(full_cache(tmp_path, shard_format=shard_format).url)
    assert (report.problems, report.rows, report.rejected, report.strays) == ([], 9, 1, [])
    assert (report.shards_done, report.shards_planned, report.incomplete) == (3, 3, 0)


@pytest.mark.parametrize(
    ("shard_format", "kind"),
    [*(("webdataset", kind) for kind in DAMAGES), *(("zarr", kind) for kind in DAMAGES if "shard" in kind)],
)
def test_damage_is_found_once_with_the_samples_it_touches(tmp_path, shard_format, kind):
    storage = full_cache(tmp_path, shard_format=shard_format)
    shard, named, damage = DAMAGES[kind]
    damage(storage)
    report = verify(tmp_path)
    (problem,) = report.problems
    assert named in str(problem)
    assert problem.keys == keys_of(shard)
    assert report.rows + report.rejected == 10 - len(problem.keys)
    assert report.strays == []
    assert problem.objects


def test_a_bit_in_a_value_that_samples_share_touches_them_all(tmp_path):
    """Of the first shard samples 1 and 2 have one image; of the second only 5 has, as 4 was rejected."""
    storage = full_cache(tmp_path)
    name = object_names(storage)[0]
    shard = webdataset_shard.read_shard(SPEC, storage.read(name))
    shared = shard.frame("vision", "values", 1)
    assert shard.frame("vision", "values", 2) == shared
    assert storage.read(name).count(shared) == 1
    flip(storage, name, (storage.read(name).index(shared) + len(shared) // 2) / (storage.size(name) - 1))
    (problem,) = verify(tmp_path).problems
    assert {key_of(1), key_of(2)} <= set(problem.keys)
    for i in (1, 2):
        with pytest.raises(CorruptShardError):
            CacheReader(tmp_path).row(key_of(i))


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_quick_audit_finds_all_but_changed_bytes(tmp_path, kind):
    storage = full_cache(tmp_path)
    shard, named, damage = DAMAGES[kind]
    damage(storage)
    report = verify(tmp_path, quick=True)
    assert report.content_sha256 == ""
    assert [(named in str(problem), problem.keys) for problem in report.problems] == (
        [] if kind == "a bit in a shard" else [(True, keys_of(shard))]
    )


@pytest.mark.parametrize("kind", ["a bit in a shard", "a lost shard"])
def test_damage_is_found_on_object_storage_too(s3_url, kind):
    shard, named, damage = DAMAGES[kind]
    damage(full_cache(s3_url))
    (problem,) = verify(s3_url).problems
    assert (named in str(problem), problem.keys) == (True, keys_of(shard))


def test_a_quick_audit_reads_no_shard(tmp_path, monkeypatch):
    full_cache(tmp_path)
    read = []
    real = LocalStorage.read
    monkeypatch.setattr(LocalStorage, "read", lambda self, name, *limit: (read.append(name), real(self, name, *limit))[1])
    assert verify(tmp_path, quick=True).rows == 9
    assert not [name for name in read if name.startswith("shards/")]
    verify(tmp_path)
    assert len([name for name in read if name.startswith("shards/")]) == 3


def test_a_cache_that_is_not_finished_is_incomplete_not_damaged(tmp_path):
    store = make_store(tmp_path)
    commit(store, 1)
    report = verify(tmp_path)
    assert (report.problems, report.rows, report.incomplete) == ([], 4, 2)


@pytest.mark.parametrize("left", ["a worker's own", "a copy"])
def test_a_second_object_is_a_stray_where_a_worker_left_it_and_a_problem_where_it_was_copied(tmp_path, left):
    storage = fill(make_store(tmp_path)).storage
    data = b"other last bits" if left == "a worker's own" else storage.read(object_names(storage)[0])
    second = object_name(1, data, ".tar")
    storage.write(second, data)
    report = verify(tmp_path)
    if left == "a copy":
        assert [problem.objects for problem in report.problems] == [(second,)]
    else:
        assert (report.problems, report.strays) == ([], [second])


def test_a_lost_record_makes_a_shard_to_do_and_a_stray_not_a_problem(tmp_path):
    storage = full_cache(tmp_path)
    storage.delete(record_name(2))
    storage.write("commits/.tmp-0123456789abcdef", b"half")
    report = verify(tmp_path)
    assert (report.problems, report.incomplete, report.rows) == ([], 1, 7)
    assert report.strays == ["commits/.tmp-0123456789abcdef", object_names(storage)[2]]


@pytest.mark.parametrize("name", ["cache.json", "plan/keys", "plan/place"])
@pytest.mark.parametrize("where", [0.0, 0.5, 0.99])
def test_a_damaged_manifest_or_plan_is_refused_as_a_whole(tmp_path, name, where):
    storage = full_cache(tmp_path)
    (name,) = (found for found in all_names(storage) if found.startswith(name))
    flip(storage, name, where)
    with pytest.raises(ValueError, match=r"cache\.json|the plan of the cache"):
        verify(tmp_path)


def test_several_problems_are_all_told(tmp_path):
    storage = full_cache(tmp_path)
    for kind in ("a bit in a record", "an empty shard", "a bit in the record of a run"):
        DAMAGES[kind][2](storage)
    assert sorted(len(problem.keys) for problem in verify(tmp_path).problems) == [0, 2, 4]


def test_a_problem_shows_a_few_of_the_samples_it_touches():
    assert str(Problem("lost", (), ("a", "b"))) == "lost [2 samples: a, b]"
    assert str(Problem("lost", (), tuple("abcd"))) == "lost [4 samples: a, b, c, ...]"
    assert str(Problem("odd")) == "odd"


def test_progress_is_told_after_each_shard(tmp_path):
    DAMAGES["a lost shard"][2](full_cache(tmp_path))
    seen = []
    verify(tmp_path, on_shard=lambda: seen.append(1))
    assert len(seen) == 3


def test_the_digest_does_not_depend_on_format_shards_order_or_the_rejected(tmp_path):
    one = verify(fill(make_store(tmp_path / "one", samples=6, shard_samples=2)).url).content_sha256
    for i, (shard_format, shard_samples) in enumerate([("webdataset", 2), ("zarr", 5), ("webdataset", 7)]):
        plan = plan_of(samples=7, shard_samples=shard_samples, order=slice(None, None, -1))
        store = CacheStore.create_or_open(tmp_path / str(i), SPEC, plan, shard_format=shard_format)
        for number in reversed(store.pending()):
            commit(store, number, reject=(6,))
        report = verify(store.url)
        assert (report.content_sha256, report.rejected, report.problems) == (one, 1, [])


def test_the_digest_depends_on_every_value(tmp_path):
    digests = set()
    for name in ("none", *make_row(1).values):
        store = make_store(tmp_path / name, samples=2)
        rows = make_rows(2)
        if name != "none":
            rows[1] = replace(rows[1], values={**rows[1].values, name: rows[1].values[name] * 2})
        store.commit_shard(0, rows, [])
        digests.add(verify(store.url).content_sha256)
    # int8-rows stores doubled values with the same codes: the scales tell them apart.
    assert len(digests) == 5


@pytest.mark.parametrize("change", [{"sample_id": "other"}, {"image_sha256": "c" * 64}])
def test_the_digest_depends_on_who_a_row_belongs_to(tmp_path, change):
    for name, row in (("a", make_row(0)), ("b", replace(make_row(0), **change))):
        make_store(tmp_path / name, samples=1).commit_shard(0, [row], [])
    assert verify(tmp_path / "a").content_sha256 != verify(tmp_path / "b").content_sha256


def test_the_digest_stays_what_it_was(tmp_path, shard_format):
    values = {
        "attention": np.linspace(0, 1, 12, dtype=np.float32).reshape(2, 3, 2),
        "vision": np.linspace(-3, 3, 8, dtype=np.float32).reshape(2, 4),
        "token_ids": np.arange(3, dtype=np.int32),
        "mass": np.array(0.25, dtype=np.float32),
    }
    store = make_store(tmp_path, samples=1, shard_format=shard_format)
    store.commit_shard(0, [replace(make_row(0), values=values)], [])
    assert verify(tmp_path).content_sha256 == CONTENT_SHA256


@pytest.mark.parametrize("name", NOTES)
def test_what_has_not_exactly_one_of_our_names_is_told_and_is_nothing_to_remove(tmp_path, name):
    storage = full_cache(tmp_path)
    whole = verify(tmp_path)
    storage.write(name, b"mine")
    report = verify(tmp_path)
    (problem,) = report.problems
    assert str(problem).startswith(f"{name}: neither a shard nor a record")
    assert (problem.objects, problem.keys, report.strays) == ((), (), [])
    assert report.content_sha256 == whole.content_sha256
    assert (CacheReader(tmp_path).records.keys(), open_store(tmp_path).pending()) == ({0, 1, 2}, [])


def test_folders_among_the_objects_are_told_and_are_nothing_to_remove(tmp_path):
    full_cache(tmp_path)
    for folder in ("shards", "commits", "plan", "runs", "tensors"):
        (tmp_path / folder / "sub").mkdir()
    problems = verify(tmp_path).problems
    told = ["commits/sub", "plan/sub", "runs/sub", "shards/sub", "tensors/sub"]
    assert sorted(str(problem).split(":")[0] for problem in problems) == told
    assert not any(problem.objects for problem in problems)


def test_a_folder_under_the_name_of_a_tensor_is_a_problem(tmp_path):
    full_cache(tmp_path)
    (tmp_path / "tensors" / "head-0123456789ab.npy").mkdir()
    assert [problem.objects for problem in verify(tmp_path).problems] == [("tensors/head-0123456789ab.npy",)]
