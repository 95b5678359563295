"""Repairing drops what is damaged and nothing else; the next run makes it again, and the cache holds what it held."""

from __future__ import annotations

import pytest
from cache_samples import all_names, contents, fill, flip, full_cache, make_store
from damages import DAMAGES

from alignkd.cache_store.errors import StorageError
from alignkd.cache_store.protocol.names import object_names, record_name
from alignkd.cache_store.protocol.repair import MIN_AGE_S, repair
from alignkd.cache_store.protocol.store import open_store
from alignkd.cache_store.protocol.verify import verify
from alignkd.cache_store.storage import open_storage
from alignkd.cache_store.storage.local import LocalStorage


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory):
    """Content sha256 of the full cache."""
    return verify(full_cache(tmp_path_factory.mktemp("whole")).url).content_sha256


def rebuild(url) -> None:
    fill(open_store(url), reject=(4,))


@pytest.mark.parametrize("kind", DAMAGES)
def test_repair_and_another_run_give_back_what_was_there(tmp_path, undamaged, kind):
    storage = full_cache(tmp_path)
    before = set(all_names(storage))
    _, _, damage = DAMAGES[kind]
    damage(storage)
    found = verify(tmp_path).problems
    done = repair(tmp_path)
    assert done.problems == found
    assert done.removed == list(dict.fromkeys(name for problem in found for name in problem.objects))
    assert all(storage.size(name) is None for name in done.removed)
    assert done.shards_to_do == len(open_store(tmp_path).pending())
    rebuild(tmp_path)
    report = verify(tmp_path)
    assert (report.problems, report.rows, report.content_sha256) == ([], 9, undamaged)
    # Only what no shard was made again of is gone for good.
    assert {name for name in before if name.startswith("shards/")} == set(object_names(storage))


@pytest.mark.parametrize("kind", ["a bit in a shard", "a shard without its end", "a bit in a record"])
def test_a_cache_of_zarr_shards_is_repaired_as_well(tmp_path, undamaged, kind):
    DAMAGES[kind][2](full_cache(tmp_path, shard_format="zarr"))
    assert repair(tmp_path).shards_to_do == 1
    rebuild(tmp_path)
    assert (verify(tmp_path).problems, verify(tmp_path).content_sha256) == ([], undamaged)


def test_a_cache_is_repaired_wherever_it_lies(url, undamaged):
    DAMAGES["a bit in a shard"][2](full_cache(url))
    assert repair(url).shards_to_do == 1
    assert open_store(url).pending() == [1]
    rebuild(url)
    assert (verify(url).problems, verify(url).content_sha256) == ([], undamaged)


def test_everything_damaged_at_once_is_repaired_at_once(tmp_path, undamaged):
    storage = full_cache(tmp_path)
    for name in all_names(storage):
        if name.startswith(("shards/", "commits/", "runs/")):
            flip(storage, name)
    assert repair(tmp_path).shards_to_do == 3
    assert not [name for name in all_names(storage) if name.startswith(("shards/", "commits/", "runs/"))]
    rebuild(tmp_path)
    assert verify(tmp_path).content_sha256 == undamaged


def test_a_sound_cache_is_left_as_it_is(tmp_path):
    storage = full_cache(tmp_path)
    before = contents(storage)
    done = repair(tmp_path, min_age_s=0)
    assert (done.problems, done.removed, done.shards_to_do) == ([], [], 0)
    assert contents(storage) == before


def test_an_unfinished_cache_is_left_as_it_is_and_told_what_is_to_do(tmp_path):
    make_store(tmp_path)
    assert repair(tmp_path).shards_to_do == 3
    assert len(all_names(open_storage(tmp_path))) == 3


def test_young_strays_stay_and_old_ones_go(tmp_path, monkeypatch):
    storage = full_cache(tmp_path)
    storage.delete(record_name(1))
    storage.write("commits/.tmp-1", b"half")
    strays = ["commits/.tmp-1", object_names(storage)[1]]
    assert repair(tmp_path).removed == []
    assert verify(tmp_path).strays == strays
    ages = {strays[0]: MIN_AGE_S + 1, strays[1]: MIN_AGE_S - 1}
    monkeypatch.setattr(LocalStorage, "age_s", lambda self, name: ages[name])
    assert repair(tmp_path).removed == strays[:1]
    assert repair(tmp_path, min_age_s=10).removed == strays[1:]


def test_a_repair_that_stops_within_leaves_a_cache_to_repair(tmp_path, undamaged, monkeypatch):
    storage = full_cache(tmp_path)
    DAMAGES["a bit in a shard"][2](storage)
    real = LocalStorage.delete

    def stop(self, name):
        if name.startswith("shards/"):
            raise StorageError("gone")
        real(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "delete", stop)
        with pytest.raises(StorageError):
            repair(tmp_path)
    # Its record went first: the shard is to be done, not damaged.
    assert (verify(tmp_path).problems, open_store(tmp_path).pending()) == ([], [1])
    rebuild(tmp_path)
    assert (verify(tmp_path).problems, verify(tmp_path).content_sha256) == ([], undamaged)


@pytest.mark.parametrize("name", ["cache.json", "plan/keys", "tensors/head"])
def test_without_manifest_plan_or_tensors_nothing_is_removed(tmp_path, name):
    storage = full_cache(tmp_path)
    (name,) = (found for found in all_names(storage) if found.startswith(name))
    flip(storage, name, 0.9)
    DAMAGES["a bit in a shard"][2](storage)
    before = contents(storage)
    with pytest.raises(ValueError, match=r"[Rr]estore"):
        repair(tmp_path)
    assert contents(storage) == before


def test_where_no_cache_is_nothing_is_repaired(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="no cache at"):
        repair(tmp_path)
    assert (tmp_path / "mine.txt").exists()
