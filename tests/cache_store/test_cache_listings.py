"""File systems whose listings lag behind, or do not keep the case of names: no shard is lost, and none is made twice."""

from __future__ import annotations

import pytest
from cache_samples import commit, fill, full_cache, make_store

from alignkd.cache_store.protocol.maintenance.repair import repair
from alignkd.cache_store.protocol.maintenance.verify import verify
from alignkd.cache_store.protocol.names import record_name
from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.cache_store.protocol.store import open_store
from alignkd.cache_store.storage.local import LocalStorage

LISTINGS = {
    "empty": lambda names: [],
    "without the last": lambda names: names[:-1],
    "in capital letters": lambda names: [name.upper() for name in names],
}


@pytest.fixture(params=LISTINGS)
def odd_listings(request, monkeypatch, tmp_path_factory):
    """Listings as such a file system gives them; every object is found by its name."""
    full_cache(tmp_path_factory.mktemp("made") / "before")  # by listings as they are
    real = LocalStorage.names
    monkeypatch.setattr(LocalStorage, "names", lambda self, folder: LISTINGS[request.param](real(self, folder)))


def test_committed_shards_are_found_by_name(tmp_path, odd_listings):
    full_cache(tmp_path)
    store = open_store(tmp_path)
    assert store.pending() == []
    status = store.status()
    assert (status.complete, status.missing, status.samples_done) == (True, (), 9)
    reader = CacheReader(tmp_path)
    assert len(list(reader.rows(reader))) == 9
    report = verify(tmp_path)
    assert (report.shards_done, report.rows, report.incomplete) == (3, 9, 0)


def test_a_sweep_and_a_repair_remove_no_committed_shard(tmp_path, odd_listings):
    full_cache(tmp_path)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    repair(tmp_path, min_age_s=0)
    open_store(tmp_path).sweep(min_age_s=0)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_worker_goes_on_where_another_stopped(tmp_path, odd_listings):
    store = make_store(tmp_path)
    commit(store, 1)
    assert open_store(tmp_path).pending() == [0, 2]
    fill(store)
    assert open_store(tmp_path).pending() == []


def test_a_committed_shard_whose_object_is_gone_is_missing_and_not_done(tmp_path):
    storage = full_cache(tmp_path)
    storage.delete(open_store(tmp_path).status().records[1].object)
    status = open_store(tmp_path).status()
    assert (status.missing, status.complete, status.shards_done, status.samples_done) == ((1,), False, 2, 6)
    (problem,) = verify(tmp_path).problems
    assert "it is missing" in str(problem)
    assert repair(tmp_path).shards_to_do == 1
    assert storage.size(record_name(1)) is None
