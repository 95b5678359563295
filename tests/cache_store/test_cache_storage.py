"""Objects are there whole or not at all, whoever writes, on whatever storage, and whatever fails."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import socket
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cache_samples import in_process
from storage_conformance import SharedStorageConformance, StorageConformance

from alignkd.cache_store.errors import StorageAccessError, StorageError, UnusableObjectError
from alignkd.cache_store.storage import local, open_storage
from alignkd.cache_store.storage.local import LocalStorage
from alignkd.cache_store.storage.remote import RemoteStorage


class TestLocalStorage(SharedStorageConformance):
    @pytest.fixture
    def storage(self, tmp_path):
        return open_storage(tmp_path / "cache")


class TestMemoryStorage(StorageConformance):
    @pytest.fixture
    def storage(self, memory_url):
        return open_storage(memory_url)


class TestS3Storage(SharedStorageConformance):
    @pytest.fixture
    def storage(self, s3_url):
        return open_storage(s3_url)


def test_a_name_is_not_taken_for_free_because_the_store_did_not_answer(memory_url, monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    storage = open_storage(memory_url)
    storage.write("a", b"first")
    info, pipe_file, failures = MemoryFileSystem.info, MemoryFileSystem.pipe_file, [OSError("no answer")] * 2

    def failing_info(self, path, **kwargs):
        if failures:
            raise failures.pop()
        return info(self, path, **kwargs)

    # A store that does not heed the condition of a write, as some do not.
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", lambda self, path, value, mode="": pipe_file(self, path, value))
    monkeypatch.setattr(MemoryFileSystem, "info", failing_info)
    assert not storage.write("a", b"second")
    assert (storage.read("a"), failures) == (b"first", [])


def files(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_path_a_file_url_and_another_url_are_told_apart(tmp_path, memory_url):
    assert isinstance(open_storage(tmp_path), LocalStorage)
    assert open_storage(f"file://{tmp_path}").root == tmp_path
    assert isinstance(open_storage(memory_url), RemoteStorage)


def test_a_scheme_that_nobody_knows_is_refused_by_name():
    with pytest.raises(ValueError, match="--cache nonsense://x/y"):
        open_storage("nonsense://x/y")


def _write_all(folder, barrier, results, worker) -> None:
    storage = LocalStorage(folder)
    barrier.wait(60)
    results.put(sum(storage.write(f"commits/{i}", b"%d" % worker * 1000) for i in range(50)))


def test_each_name_has_one_writer_of_many_processes(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.SimpleQueue()
    workers = [context.Process(target=_write_all, args=(tmp_path, barrier, results, worker)) for worker in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert sum(results.get() for _ in workers) == 50
    assert len(files(tmp_path)) == 50
    assert all(len(set((tmp_path / name).read_bytes())) == 1 for name in files(tmp_path))


def test_no_temporary_stays_after_writing(tmp_path):
    storage = LocalStorage(tmp_path)
    for _ in range(2):
        storage.write("a/b", b"x")
    assert files(tmp_path) == ["a/b"]


@pytest.mark.parametrize("step", ["fsync", "link"])
def test_a_disk_that_fails_leaves_nothing_and_says_what_to_do(tmp_path, monkeypatch, step):
    def fail(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    storage = LocalStorage(tmp_path)
    storage.write("a/old", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        if step == "link":  # without hard links a rename does; it fails as well
            patch.setattr(os, "replace", fail)
        with pytest.raises(StorageError, match=r"cannot write .*a/new: No space left.*Nothing is half-written.*run the same"):
            storage.write("a/new", b"new")
    assert files(tmp_path) == ["a/old"]
    assert storage.write("a/new", b"new")


def test_a_file_that_may_not_grow_so_large_leaves_nothing(tmp_path):
    storage = LocalStorage(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(StorageAccessError, match=r"cannot write .*big"):
            storage.write("big", bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path) == []
    assert storage.write("big", bytes(100_000))


FULL_DISK = """
import sys
from alignkd.cache_store.errors import StorageError
from alignkd.cache_store.storage.local import LocalStorage
storage = LocalStorage(sys.argv[1])
assert storage.write("first", bytes(40_000))
try:
    storage.write("second", bytes(40_000))
except StorageError as error:
    assert "No space left" in str(error)
else:
    raise AssertionError("the disk was not full")
assert storage.names("") == ["first"]
storage.delete("first")
assert storage.write("second", bytes(40_000))
"""


def test_a_disk_that_is_really_full_leaves_nothing(tmp_path):
    mount = f'mount -t tmpfs -o size=64k none "{tmp_path}"'
    private = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    try:
        subprocess.run([*private, mount], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no private mounts here")
    script = f'{mount} && exec "$0" -c "$1" "{tmp_path}"'
    done = subprocess.run([*private, script, sys.executable, FULL_DISK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _write_as_nobody(storage: LocalStorage) -> list[str]:
    if os.getuid() == 0:
        os.setuid(65534)
    messages = []
    for deed in (lambda: storage.write("a/new", b"new"), lambda: storage.delete("a/old"), lambda: storage.read("locked")):
        try:
            deed()
        except StorageAccessError as error:
            messages.append(str(error))
    return messages


def test_missing_permissions_are_said_once_for_what_was_tried(tmp_path):
    storage = LocalStorage(tmp_path)
    storage.write("a/old", b"old")
    storage.write("locked", b"secret")
    (tmp_path / "locked").chmod(0)
    (tmp_path / "a").chmod(0o555)
    messages = in_process("fork", _write_as_nobody, storage)
    (tmp_path / "a").chmod(0o755)
    assert [message.split(str(tmp_path))[0] for message in messages] == ["cannot write ", "cannot delete ", "cannot read "]
    assert all("Permission denied" in message and "permissions" in message for message in messages)
    assert files(tmp_path) == ["a/old", "locked"]


def test_a_cache_below_a_file_is_refused_as_such(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StorageAccessError, match=r"cannot write .*notes.txt/shards/a: Not a directory"):
        LocalStorage(tmp_path / "notes.txt").write("shards/a", b"x")


def test_file_and_folder_are_on_disk_before_and_after_the_name(tmp_path, monkeypatch):
    calls = []
    fsync, link = os.fsync, os.link

    def spy_fsync(descriptor):
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else f"{os.fstat(descriptor).st_size} bytes")
        fsync(descriptor)

    def spy_link(source, target):
        calls.append(f"link {os.path.basename(target)}")
        link(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "link", spy_link)
    LocalStorage(tmp_path).write("file", b"data")
    assert calls == ["4 bytes", "link file", "folder"]


def test_without_hard_links_a_name_is_given_once_all_the_same(tmp_path, monkeypatch):
    def unsupported(*_args):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", unsupported)
    storage = LocalStorage(tmp_path)
    assert storage.write("a", b"first")
    assert not storage.write("a", b"second")
    assert storage.read("a") == b"first"
    assert files(tmp_path) == ["a"]


FOLDERS = ("plan", "runs", "tensors", "shards", "commits", "workers")


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("deed", ["write", "delete"])
def test_nothing_is_written_or_removed_through_a_folder_that_is_a_link(tmp_path, folder, deed):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "a").write_text("precious")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / folder).symlink_to(tmp_path / "theirs")
    storage = LocalStorage(tmp_path / "cache")
    with pytest.raises(StorageAccessError, match=rf"cache/{folder} is a link to .*theirs, expected a folder of its own"):
        storage.write(f"{folder}/b", b"x") if deed == "write" else storage.delete(f"{folder}/a")
    assert files(tmp_path / "theirs") == ["a"]
    assert storage.read(f"{folder}/a") == b"precious"  # whoever only reads may follow links


def test_a_cache_whose_own_folder_is_a_link_is_written(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "disk")
    storage = LocalStorage(tmp_path / "cache")
    assert storage.write("shards/a", b"x")
    storage.delete("shards/a")
    assert files(tmp_path / "disk") == []


def test_of_an_object_that_is_a_link_only_the_link_is_removed(tmp_path):
    (tmp_path / "theirs").write_text("precious")
    (tmp_path / "cache" / "shards").mkdir(parents=True)
    (tmp_path / "cache" / "shards" / "a").symlink_to(tmp_path / "theirs")
    storage = LocalStorage(tmp_path / "cache")
    assert storage.write("shards/a", b"x") is False
    storage.delete("shards/a")
    assert (tmp_path / "theirs").read_text() == "precious"
    assert storage.names("shards") == []


def put_special(path, kind):
    if kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))


@pytest.mark.parametrize("kind", ["a named pipe", "a device", "a socket"])
def test_only_plain_files_are_read(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    put_special(Path("a"), kind)  # the names of sockets may not be long
    with pytest.raises(UnusableObjectError, match=rf"a: found {kind}, expected a plain file"):
        in_thread(LocalStorage(tmp_path).read, "a")
    assert LocalStorage(tmp_path).size("a") is None


def test_a_folder_is_not_removed_as_an_object(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(StorageAccessError, match=r"cannot delete .*a: it is a folder"):
        LocalStorage(tmp_path).delete("a")


def in_thread(function, *arguments):
    """The result of a call that may not take for ever."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result(30)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_sync_a_folder_is_written_and_told_once(tmp_path, monkeypatch, caplog, number):
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(local, "_told", set())
    storage = LocalStorage(tmp_path)
    for i in range(3):
        assert storage.write(f"shards/{i}", b"x")
    assert storage.names("shards") == ["0", "1", "2"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cannot sync a folder" in caplog.text


@pytest.mark.parametrize(("number", "code"), [(errno.EIO, StorageError), (errno.EACCES, StorageAccessError)])
def test_any_other_failure_to_sync_a_folder_is_an_error(tmp_path, monkeypatch, number, code):
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(code):
        LocalStorage(tmp_path).write("a", b"x")


def test_the_clock_of_the_machine_and_that_of_the_storage_are_told_apart(tmp_path, monkeypatch):
    storage, real = LocalStorage(tmp_path), time.time
    assert abs(storage.clock_lead_s()) < 5
    monkeypatch.setattr(time, "time", lambda: real() + 7200)
    assert 7195 < storage.clock_lead_s() < 7205
    assert files(tmp_path) == []
