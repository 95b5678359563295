from __future__ import annotations

import itertools

import pytest

from alignkd.cache_store.storage.remote import RemoteStorage

_FOLDERS = itertools.count()


@pytest.fixture(autouse=True)
def _no_long_waits(monkeypatch):
    monkeypatch.setattr(RemoteStorage, "first_wait_s", 0.001)


@pytest.fixture
def memory_url():
    from fsspec.implementations.memory import MemoryFileSystem

    yield f"memory://cache-{next(_FOLDERS)}/one"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture(params=["local", "memory", "s3"])
def url(request, tmp_path):
    """Where a cache may lie: a folder that is not there yet, and URLs."""
    return str(tmp_path / "cache") if request.param == "local" else request.getfixturevalue(f"{request.param}_url")


@pytest.fixture(params=["zarr", "webdataset"])
def shard_format(request):
    return request.param
