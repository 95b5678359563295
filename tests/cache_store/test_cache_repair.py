"""Repairing drops what is damaged and nothing else; the next run makes it again, and the cache holds what it held."""

from __future__ import annotations

import os
import time

import pytest
from cache_samples import all_names, contents, fill, flip, full_cache, make_store
from damages import DAMAGES, NOTES

from alignkd.cache_store.errors import CorruptRecordError, StorageAccessError, StorageError
from alignkd.cache_store.protocol.maintenance.repair import MIN_AGE_S, repair
from alignkd.cache_store.protocol.maintenance.verify import verify
from alignkd.cache_store.protocol.names import object_names, record_name
from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.cache_store.protocol.store import open_store
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
    storage.write("commits/.tmp-0123456789abcdef", b"half")
    strays = ["commits/.tmp-0123456789abcdef", object_names(storage)[1]]
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


@pytest.mark.parametrize("folder", ["plan", "runs", "tensors", "shards", "commits"])
@pytest.mark.parametrize("deed", ["repair", "sweep", "create_or_open"])
def test_a_cache_with_a_folder_that_is_a_link_is_not_repaired_swept_or_continued(tmp_path, folder, deed):
    cache, theirs = tmp_path / "cache", tmp_path / "theirs"
    full_cache(cache)
    (cache / folder).rename(theirs)
    for name in ("thesis.docx", ".tmp-notes", ".tmp-0123456789abcdef", "000009-0123456789ab.tar", "0123456789abcdef.json"):
        (theirs / name).write_text("precious")
    (cache / folder).symlink_to(theirs)
    before = sorted(os.listdir(theirs))
    deeds = {
        "repair": lambda: repair(cache, min_age_s=0),
        "sweep": lambda: open_store(cache).sweep(min_age_s=0),
        "create_or_open": lambda: make_store(cache),
    }
    with pytest.raises(StorageAccessError, match=rf"cache/{folder} is a link to"):
        deeds[deed]()
    assert sorted(os.listdir(theirs)) == before
    assert len(CacheReader(cache)) == 9


@pytest.mark.parametrize("name", NOTES)
def test_what_has_not_exactly_one_of_our_names_is_left_by_repair(tmp_path, name):
    storage = full_cache(tmp_path)
    storage.write(name, b"mine")
    DAMAGES["a bit in a shard"][2](storage)
    done = repair(tmp_path, min_age_s=0)
    assert name not in done.removed
    assert storage.read(name) == b"mine"


def test_a_pipe_under_the_name_of_a_record_is_damage_that_is_repaired(tmp_path, undamaged):
    full_cache(tmp_path)
    (tmp_path / record_name(1)).unlink()
    os.mkfifo(tmp_path / record_name(1))
    with pytest.raises(CorruptRecordError, match=r"000001\.json: found a named pipe, expected a plain file.*cache repair"):
        open_store(tmp_path).status()
    assert repair(tmp_path).shards_to_do == 1
    rebuild(tmp_path)
    assert verify(tmp_path).content_sha256 == undamaged


@pytest.mark.parametrize("step_s", [2 * MIN_AGE_S, -2 * MIN_AGE_S])
def test_a_clock_that_is_set_while_workers_write_makes_no_young_object_a_stray(tmp_path, monkeypatch, step_s):
    storage, now = full_cache(tmp_path), time.time
    storage.delete(record_name(1))
    old = object_names(storage)[2]
    storage.delete(record_name(2))
    os.utime(tmp_path / old, (now() - MIN_AGE_S - 60,) * 2)
    monkeypatch.setattr(time, "time", lambda: now() + step_s)
    assert repair(tmp_path).removed == [old]
