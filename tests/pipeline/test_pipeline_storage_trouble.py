"""Storage that fails in the middle of stage one: one message, an exit code that says whether trying again can help, and
nothing that a rerun does not mend."""

from __future__ import annotations

import errno
import itertools
import os

import pytest
from click.testing import CliRunner
from tiny_runs import IMAGES, TEACHER, content, numbered, write_cache, write_data

from alignkd.cache_store.protocol.maintenance.verify import verify
from alignkd.cache_store.protocol.store import open_store
from alignkd.cache_store.storage import local as storage_module
from alignkd.cache_store.storage.local import LocalStorage
from alignkd.cache_store.storage.remote import RemoteStorage
from alignkd.cli import main


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("eight") / "data.json", numbered(8))


@pytest.fixture(scope="module")
def expected(eight, tmp_path_factory):
    cache = tmp_path_factory.mktemp("expected") / "cache"
    write_cache(eight, cache)
    return content(cache)


def arguments(data, cache):
    given = {
        "--teacher": TEACHER,
        "--data": data,
        "--images": IMAGES,
        "--cache": cache,
        "--shard-samples": 2,
        "--device": "cpu",
    }
    return ["cache-teacher", *(str(word) for pair in given.items() for word in pair)]


def refused(data, cache, *parts, code=75):
    result = CliRunner().invoke(main, arguments(data, cache))
    assert result.exit_code == code, result.stderr
    assert "Traceback" not in result.stderr
    assert sum(line.startswith("Error: ") for line in result.stderr.splitlines()) == 1
    words = result.stderr.partition("Error: ")[2]
    for part in parts:
        assert part in words
    return words


def fail_from(call, number, monkeypatch):
    """Have every fsync from the ``call``-th on fail, as writes to a full disk do."""
    calls, real = itertools.count(1), os.fsync

    def fsync(descriptor):
        if next(calls) >= call:
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(storage_module.os, "fsync", fsync)


TROUBLES = {
    "disk full": (errno.ENOSPC, "No space left on device", 75),
    "read-only": (errno.EROFS, "Read-only file system", 75),
    "file server": (errno.ESTALE, "Stale file handle", 75),
    "permission": (errno.EACCES, "Permission denied", 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TROUBLES)
def test_trouble_in_the_middle_is_one_message_and_a_rerun_completes_the_same_cache(
    tmp_path, eight, expected, monkeypatch, name
):
    number, words, code = TROUBLES[name]
    cache = tmp_path / "cache"
    with monkeypatch.context() as patch:
        fail_from(36, number, patch)
        message = refused(eight, cache, "cannot write", str(cache), words, "run the same command again", code=code)
    assert message.count("cannot write") == 1
    assert 1 <= open_store(cache).status().shards_done < 4
    assert write_cache(eight, cache)["complete"]
    assert content(cache) == expected


@pytest.mark.parametrize("call", [1, 4, 8, 13, 24, 31])
def test_trouble_at_any_write_leaves_no_half_cache(tmp_path, eight, monkeypatch, call):
    cache = tmp_path / "cache"
    with monkeypatch.context() as patch:
        fail_from(call, errno.ENOSPC, patch)
        refused(eight, cache, "No space left on device")
    if (cache / "cache.json").exists():
        assert verify(cache).problems == []
    assert not list(cache.rglob(".tmp-*"))


def test_a_full_disk_while_the_object_is_written_is_named_once_and_leaves_no_temporary(tmp_path, eight, expected, monkeypatch):
    real = LocalStorage._write

    def write(self, path, data):
        if path.parent.name == "shards":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, path, data)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "_write", write)
        refused(eight, tmp_path / "cache", "shards/00000", "No space left on device")
    assert write_cache(eight, tmp_path / "cache")["complete"]
    assert content(tmp_path / "cache") == expected


def test_a_file_where_the_cache_should_be_is_one_message(tmp_path, eight):
    (tmp_path / "cache").write_text("mine")
    refused(eight, tmp_path / "cache", str(tmp_path / "cache"), code=2)
    assert (tmp_path / "cache").read_text() == "mine"


@pytest.mark.slow
def test_an_object_store_that_stops_answering_is_one_message_and_a_rerun_completes_the_same_cache(
    s3, s3_url, eight, expected, monkeypatch
):
    monkeypatch.setattr(RemoteStorage, "first_wait_s", 0.001)
    s3.fail("500", "PUT", "shards/000002", times=-1)
    refused(eight, s3_url, "cannot write", f"{s3_url}/shards/000002", "tried 6 times", "run the same command again")
    assert 2 in open_store(s3_url).pending()
    s3.reset()
    assert write_cache(eight, s3_url)["complete"]
    assert content(s3_url) == expected


@pytest.mark.slow
def test_an_object_store_that_stumbles_is_asked_again_and_nothing_is_lost(s3, s3_url, eight, expected, monkeypatch):
    monkeypatch.setattr(RemoteStorage, "first_wait_s", 0.001)
    faults = [s3.fail(kind, "PUT", name) for kind, name in (("500", "shards/"), ("drop after", "commits/"), ("drop", "runs/"))]
    assert write_cache(eight, s3_url)["complete"]
    assert [fault.met for fault in faults] == [1, 1, 1]
    assert content(s3_url) == expected


def test_credentials_that_are_refused_are_one_message_at_once(s3, s3_url, eight, monkeypatch):
    monkeypatch.setattr("s3fs.S3FileSystem._info", denied)
    refused(eight, s3_url, s3_url, "Check the credentials and their rights", code=2)


async def denied(*arguments, **keywords):
    raise PermissionError("Access Denied")
