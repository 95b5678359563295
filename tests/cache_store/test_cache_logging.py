"""What operators can log: commits, sweeps and retries, under the logger alignkd.cache_store."""

from __future__ import annotations

import logging

from cache_samples import commit, make_store

from alignkd.cache_store.storage import open_storage


def test_a_commit_and_a_sweep_are_logged(tmp_path, caplog):
    caplog.set_level(logging.DEBUG, "alignkd.cache_store")
    store = make_store(tmp_path)
    record = commit(store, 0)
    store.storage.write("shards/000001-0123456789ab.tar", b"left")
    store.sweep(min_age_s=0)
    assert [entry.getMessage() for entry in caplog.records] == [
        f"committed shard 0: {record.object}, 4 rows, {record.bytes} bytes",
        "swept shards/000001-0123456789ab.tar: no commit record names it",
    ]
    assert all(entry.name.startswith("alignkd.cache_store.") for entry in caplog.records)


def test_a_retry_is_a_warning(memory_url, caplog, monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    storage = open_storage(memory_url)
    storage.write("a", b"x")
    real, failures = MemoryFileSystem.cat_file, [OSError("no answer")]

    def failing(self, *args, **kwargs):
        if failures:
            raise failures.pop()
        return real(self, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", failing)
    assert storage.read("a") == b"x"
    (entry,) = caplog.records
    assert entry.levelno == logging.WARNING
    assert "tried 1 times: OSError: no answer; retry 1 of 5 in" in entry.getMessage()
