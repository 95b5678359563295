"""An object store that answers late, wrongly or not at all: asked again, then one clear error, and nothing half-committed."""

from __future__ import annotations

import pytest
from cache_samples import TENSORS, all_names, commit, fill, full_cache, make_store

from alignkd.cache_store.errors import StorageAccessError, StorageError
from alignkd.cache_store.protocol.maintenance.verify import verify
from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.cache_store.protocol.store import open_store
from alignkd.cache_store.storage import open_storage
from alignkd.cache_store.storage import remote as storage_module
from alignkd.cache_store.storage.remote import RemoteStorage


@pytest.fixture
def impatient(s3, monkeypatch):
    """The user's own configuration: gives up waiting for an answer after a quarter of a second."""
    from fsspec.config import conf

    monkeypatch.setitem(conf["s3"], "config_kwargs", {"read_timeout": 0.25})


@pytest.fixture
def storage(s3, s3_url):
    storage = open_storage(s3_url)
    storage.write("shards/a", b"x" * 1000)
    s3.reset()
    return storage


@pytest.mark.parametrize("kind", ["500", "drop", "cut"])
def test_a_read_that_fails_is_asked_for_again(s3, storage, kind):
    fault = s3.fail(kind, "GET", "shards/a", times=3)
    assert storage.read("shards/a") == b"x" * 1000
    assert fault.met == 3


def test_an_answer_that_is_late_is_asked_for_again(impatient, s3, storage):
    fault = s3.fail("slow", times=2, seconds=0.6)
    assert storage.read("shards/a") == b"x" * 1000
    assert fault.met == 2


@pytest.mark.parametrize("kind", ["500", "drop"])
def test_every_deed_is_tried_again(s3, storage, kind):
    for deed in (
        lambda: storage.write("shards/b", b"new"),
        lambda: storage.size("shards/a") == 1000,
        lambda: storage.names("shards") == ["a", "b"],
        lambda: storage.age_s("shards/a") >= 0,
        lambda: storage.delete("shards/b") is None,
    ):
        fault = s3.fail(kind)
        assert deed()
        assert fault.met == 1
    assert storage.names("shards") == ["a"]


def test_waits_grow_and_then_there_is_one_error_that_says_what_to_do(s3, storage, monkeypatch):
    waits = []
    monkeypatch.setattr(storage_module.time, "sleep", waits.append)
    monkeypatch.setattr(storage_module.random, "uniform", lambda low, high: (low + high) / 2)
    s3.fail("500", times=-1)
    with pytest.raises(StorageError) as caught:
        storage.read("shards/a")
    assert waits == [0.001, 0.002, 0.004, 0.008, 0.016]
    message = str(caught.value)
    assert message.startswith(f"cannot read {storage.url}/shards/a, tried 6 times: ")
    assert "Nothing is half-written; run the same command again when the store answers" in message


@pytest.mark.parametrize("kind", ["500", "drop"])
def test_a_dead_store_is_asked_by_nobody_but_us(s3, storage, kind):
    s3.fail(kind, times=-1)
    with pytest.raises(StorageError):
        storage.write("shards/b", b"x")
    # aiohttp itself tries a second time on a connection that was closed.
    assert len(s3.requests) <= 2 * RemoteStorage.attempts


def test_a_store_that_is_gone_is_one_clear_error(s3, storage, monkeypatch):
    from fsspec.config import conf

    monkeypatch.setitem(conf["s3"], "endpoint_url", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"cannot list .*, tried 6 times: .*127.0.0.1:9"):
        open_storage(storage.url).names("shards")


def test_a_refusal_is_not_tried_again(s3, storage):
    fault = s3.fail("403", times=-1)
    with pytest.raises(StorageAccessError, match=r"cannot write .*shards/b: .*Check the credentials and their rights"):
        storage.write("shards/b", b"x")
    assert fault.met == 1


def test_a_bucket_that_is_not_there_is_said_so(s3):
    with pytest.raises(
        StorageAccessError, match=r"cannot write s3://nowhere/cache/plan/.*bucket does not exist.*Create the bucket"
    ):
        make_store("s3://nowhere/cache")


def test_timeouts_have_a_default_and_the_users_own_win(impatient, s3_url, monkeypatch):
    def settings():
        fs, _ = RemoteStorage(s3_url)._filesystem()
        fs.connect()
        config = fs.s3.meta.config
        return config.connect_timeout, config.read_timeout, config.retries["total_max_attempts"]

    assert settings() == (5, 0.25, 1)
    monkeypatch.undo()
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    assert settings() == (5, 15, 1)


@pytest.mark.parametrize("kind", ["500", "drop", "500 after", "drop after"])
def test_writes_that_fail_once_each_neither_lose_nor_double_a_shard(s3, s3_url, kind):
    names = ("tensors/head", "plan/keys", "cache.json", "shards/000000", "commits/000001", "runs/")
    faults = [s3.fail(kind, "PUT", name) for name in names]
    store = fill(make_store(s3_url, shard_samples=5, tensors=TENSORS), reject=(4,))
    store.write_run({"seed": 1})
    assert all(fault.met == 1 for fault in faults)
    report = verify(s3_url)
    assert (report.problems, report.strays, report.rows, report.rejected) == ([], [], 9, 1)
    assert len(all_names(store.storage)) == 1 + 2 + 2 + 1 + 2 + 2


def test_the_worker_whose_answer_was_lost_gets_its_own_record(s3, s3_url):
    store = make_store(s3_url)
    s3.fail("500 after", "PUT", "commits/")
    assert commit(store, 0, worker="me").worker == "me"
    assert store.pending() == [1, 2]


@pytest.mark.parametrize("name", ["shards/", "commits/"])
def test_a_store_that_dies_within_a_commit_leaves_a_shard_to_be_done_again(s3, s3_url, name):
    store = make_store(s3_url, samples=4)
    s3.fail("500", "PUT", name, times=-1)
    with pytest.raises(StorageError, match=f"cannot write {s3_url}/{name}"):
        commit(store, 0)
    s3.reset()
    report = verify(s3_url)
    assert (report.problems, report.shards_done, len(report.strays)) == ([], 0, name == "commits/")
    assert store.pending() == [0]
    fill(store)
    report = verify(s3_url)
    assert (report.problems, report.strays, report.rows) == ([], [], 4)


def test_a_manifest_that_could_not_be_written_leaves_no_cache(s3, s3_url):
    s3.fail("500", "PUT", "cache.json", times=-1)
    with pytest.raises(StorageError):
        make_store(s3_url)
    s3.reset()
    with pytest.raises(ValueError, match="no cache at"):
        open_store(s3_url)
    assert make_store(s3_url).pending() == [0, 1, 2]


def test_reading_goes_on_through_passing_faults(s3, s3_url):
    full_cache(s3_url)
    for kind in ("500", "drop", "cut"):
        s3.fail(kind, "GET", "shards/")
        s3.fail(kind, "GET", "commits/")
        s3.fail(kind, "GET", "tensors/")
    reader = CacheReader(s3_url)
    assert len(list(reader.rows(reader))) == 9
    assert (reader.tensors["head"] == TENSORS["head"]).all()
    assert all(fault.met == 1 for fault in s3.faults)
