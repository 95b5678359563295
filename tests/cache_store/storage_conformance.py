"""What every storage promises; a test class inherits this and says where its ``storage`` is."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
from cache_samples import in_process

from alignkd.cache_store.errors import UnusableObjectError
from alignkd.cache_store.storage import Storage, open_storage, read_all
from alignkd.cache_store.storage import remote as storage_module

BYTES = bytes(range(256)) * 400


def _read_and_write(storage: Storage) -> tuple[bytes, bool, bytes]:
    return storage.read("shards/a"), storage.write("shards/child", b"child"), storage.read("shards/child")


class StorageConformance:
    @pytest.mark.parametrize("data", [b"", b"x", BYTES], ids=["empty", "one", "many"])
    def test_what_was_written_is_read_again(self, storage, data):
        assert storage.write("shards/000001-abc.tar", data) is True
        assert storage.read("shards/000001-abc.tar") == data
        assert storage.size("shards/000001-abc.tar") == len(data)

    @pytest.mark.parametrize(("start", "stop"), [(0, 5), (3, 3), (5, 4), (0, len(BYTES)), (len(BYTES) - 4, len(BYTES) + 9)])
    def test_a_part_of_an_object_is_what_lies_there(self, storage, start, stop):
        storage.write("shards/a", BYTES)
        assert storage.read_range("shards/a", start, stop) == BYTES[start:stop]
        with pytest.raises(FileNotFoundError):
            storage.read_range("shards/b", 0, 4)

    @pytest.mark.parametrize("again", [b"first", b"second", b""])
    def test_a_name_that_is_taken_is_left_as_it_is(self, storage, again):
        storage.write("commits/a", b"first")
        assert storage.write("commits/a", again) is False
        assert storage.read("commits/a") == b"first"
        assert storage.names("commits") == ["a"]

    def test_names_are_those_of_one_folder_sorted_and_up_to_date(self, storage):
        for name in ("shards/b", "shards/a", "commits/c", "top"):
            storage.write(name, b"x")
        assert storage.names("shards") == ["a", "b"]
        assert storage.names("") == ["commits", "shards", "top"]
        storage.write("shards/0", b"x")
        storage.delete("shards/b")
        assert storage.names("shards") == ["0", "a"]

    def test_another_hand_sees_every_change_at_once(self, storage):
        other = open_storage(storage.url)
        storage.write("shards/a", b"x")
        assert (other.names("shards"), other.size("shards/b")) == (["a"], None)
        storage.write("shards/b", b"y")
        assert (other.names("shards"), other.size("shards/b"), other.read("shards/b")) == (["a", "b"], 1, b"y")
        storage.delete("shards/a")
        assert (other.names("shards"), other.size("shards/a")) == (["b"], None)

    def test_a_folder_that_is_not_there_has_no_names(self, storage):
        assert storage.names("shards") == []
        assert storage.names("") == []

    def test_what_is_not_there_is_missing_and_nothing_else(self, storage):
        storage.write("shards/a", b"x")
        for name in ("nothing", "shards/b", "shards/a/b", "nowhere/a"):
            with pytest.raises(FileNotFoundError):
                storage.read(name)
            assert storage.size(name) is None
            assert storage.age_s(name) == 0
            storage.delete(name)
        assert storage.size("shards") is None

    def test_what_was_deleted_may_be_written_anew(self, storage):
        storage.write("a", b"one")
        storage.delete("a")
        assert storage.size("a") is None
        assert storage.write("a", b"two")
        assert storage.read("a") == b"two"

    def test_an_object_grows_old(self, storage, monkeypatch):
        storage.write("a", b"x")
        now = storage_module.time.time()
        monkeypatch.setattr(storage_module.time, "time", lambda: now + 1000)
        assert 990 < storage.age_s("a") < 1060

    def test_the_clock_that_dates_objects_is_asked_and_nothing_stays(self, storage, monkeypatch):
        storage.write("a", b"x")
        now = storage_module.time.time
        monkeypatch.setattr(storage_module.time, "time", lambda: now() + 7200)
        assert abs(storage.age_s("a") - storage.clock_lead_s()) < 60
        assert storage.names("") == ["a"]

    def test_more_than_may_be_read_is_refused_before_it_is_read(self, storage, monkeypatch):
        monkeypatch.setattr(storage_module, "_SMALL", 0)
        storage.write("a", BYTES)
        assert storage.read("a", len(BYTES)) == BYTES
        with pytest.raises(UnusableObjectError, match=rf"found {len(BYTES)} bytes, expected at most {len(BYTES) - 1} bytes"):
            storage.read("a", len(BYTES) - 1)

    def test_many_objects_are_read_in_the_order_asked_for(self, storage):
        names = [f"commits/{i}" for i in range(20)]
        for name in names:
            storage.write(name, name.encode())
        assert [data.decode() for data in read_all(storage, names[::-1])] == names[::-1]

    def test_it_is_pickled_without_its_connections(self, storage):
        storage.write("shards/a", b"x")
        data = pickle.dumps(storage)
        assert b"fsspec" not in data
        copy = pickle.loads(data)
        assert copy.read("shards/a") == b"x"
        assert copy.write("shards/b", b"y")

    def test_a_forked_process_reads_and_writes_and_so_does_its_parent_still(self, storage):
        storage.write("shards/a", b"parent")
        assert in_process("fork", _read_and_write, storage) == (b"parent", True, b"child")
        assert storage.read("shards/a") == b"parent"
        assert storage.write("shards/b", b"x")


class SharedStorageConformance(StorageConformance):
    """Of storages that several processes share, and on which one of many writers wins."""

    def test_one_of_many_threads_that_write_a_name_wins(self, storage):
        others = [storage, open_storage(storage.url)]
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda i: others[i % 2].write("commits/a", b"%d" % i), range(8)))
        assert sum(won) == 1
        assert storage.read("commits/a") == b"%d" % won.index(True)
        assert storage.names("commits") == ["a"]

    def test_what_a_forked_process_wrote_is_there(self, storage):
        storage.write("shards/a", b"parent")
        in_process("fork", _read_and_write, storage)
        assert storage.read("shards/child") == b"child"

    def test_a_spawned_process_reads_and_writes(self, storage):
        storage.write("shards/a", b"parent")
        assert in_process("spawn", _read_and_write, storage) == (b"parent", True, b"child")
        assert storage.read("shards/child") == b"child"
