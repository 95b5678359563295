"""The local cache of files from elsewhere: never above its size, oldest use first, whole copies, safe between processes."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import random

import fsspec
import pytest
from data_conformance import write_json
from tiny_runs import IMAGES, SAMPLES

from alignkd.errors import ConfigError, DataError, SampleError, TransientError
from alignkd.pipeline.config.shared import DataSettings
from alignkd.pipeline.data.files.local_cache import LocalCache, LocalCacheFullError, local_cache, parse_size
from alignkd.pipeline.data.images.places import place_of, read_place
from alignkd.pipeline.data.open_samples import open_samples


def size_of(folder):
    return sum(path.stat().st_size for path in folder.glob("??/*"))


def put(cache, name, data):
    with cache.open(name, lambda writer: writer.write(data)) as file:
        return file.read()


def fails(writer):
    writer.write(b"half")
    raise DataError("the rest is not there")


def test_a_copy_is_made_once_and_read_again(tmp_path):
    cache = LocalCache(tmp_path, 1000)
    assert put(cache, "a", b"first") == b"first"
    assert put(cache, "a", b"another") == b"first"
    with pytest.raises(DataError, match="not there"):
        cache.open("b", fails)
    assert size_of(tmp_path) == len(b"first")
    assert put(cache, "b", b"whole") == b"whole"


def test_the_copy_that_was_used_least_recently_goes_first(tmp_path):
    cache = LocalCache(tmp_path, 100)
    for name in "abc":
        put(cache, name, name.encode() * 30)
    for place, path in enumerate(sorted(tmp_path.glob("??/*"), key=lambda path: path.read_bytes())):
        os.utime(path, (1000 + place, 1000 + place))  # a was used first, c last
    put(cache, "a", b"")  # used again
    put(cache, "d", b"d" * 30)
    left = {path.read_bytes()[:1] for path in tmp_path.glob("??/*")}
    assert left == {b"a", b"d"} | ({b"c"} if b"c" in left else set())
    assert b"b" not in left


def test_a_file_that_is_larger_than_the_cache_is_refused_and_leaves_nothing(tmp_path):
    cache = LocalCache(tmp_path, 100)
    with pytest.raises(LocalCacheFullError, match="--local-cache a larger"):
        put(cache, "large", b"x" * 101)
    assert size_of(tmp_path) == 0
    assert put(cache, "small", b"x" * 100) == b"x" * 100


def test_what_a_killed_process_left_is_removed_when_room_is_needed(tmp_path):
    cache = LocalCache(tmp_path, 100)
    put(cache, "a", b"x" * 10)
    (stray,) = tmp_path.glob("??/*")
    left = stray.with_name(".left-by-another")
    left.write_bytes(b"y" * 80)
    (tmp_path / "used").unlink()
    assert put(cache, "b", b"z" * 90) == b"z" * 90
    assert not left.exists()
    assert size_of(tmp_path) <= 100


MOST, LARGEST = 5000, 900


def _use(folder, seed, problems):
    cache, generator = LocalCache(folder, MOST), random.Random(seed)
    for _ in range(150):
        name = generator.randrange(30)
        wanted = bytes([name]) * (30 * name + 20)
        if put(cache, str(name), wanted) != wanted:
            problems.put(f"copy {name} is not whole")
        with cache._locked():  # files that come and go while they are added up would be counted that never were there together
            size = size_of(folder)
        if size > MOST:
            problems.put(f"{size} bytes")


@pytest.mark.processes
def test_processes_that_share_a_cache_read_whole_copies_and_keep_its_size(tmp_path):
    context = multiprocessing.get_context("fork")
    problems = context.Queue()
    workers = [context.Process(target=_use, args=(tmp_path, seed, problems)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert problems.empty(), problems.get()
    assert size_of(tmp_path) <= MOST
    assert int((tmp_path / "used").read_bytes()) >= size_of(tmp_path)


@pytest.mark.parametrize(("text", "size"), [("50GB", 50 * 10**9), ("500M", 500 * 10**6), ("1.5 TB", 15 * 10**11), ("7", 7)])
def test_a_size_is_a_number_with_a_unit(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "many", "-1GB", "0", "1PB", "1e3"])
def test_another_size_is_refused(text):
    with pytest.raises(ConfigError, match="expected one such as 50GB"):
        parse_size(text)


def test_a_folder_that_cannot_be_written_is_said_with_the_way_out(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ALIGNKD_CACHE", str(tmp_path / "file"))
    with pytest.raises((ConfigError, TransientError), match="ALIGNKD_CACHE"):
        put(local_cache(), "a", b"")


def test_a_bomb_of_gzip_stops_at_the_size_of_the_cache(tmp_path):
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=9) as file:
        for _ in range(64):
            file.write(b" " * 2**20)
    assert path.stat().st_size < 2**17
    with pytest.raises(LocalCacheFullError, match=r"bomb\.jsonl\.gz.*--local-cache"):
        open_samples(DataSettings(data=str(path), local_cache="8MB"))
    assert size_of(local_cache().folder) <= 8 * 10**6


@pytest.mark.parametrize("cut", [2, 20, -5])
def test_gzip_that_is_cut_short_is_refused_by_name(tmp_path, cut):
    path = tmp_path / "cut.json.gz"
    path.write_bytes(gzip.compress(json.dumps(SAMPLES).encode())[:cut])
    with pytest.raises(DataError, match=r"cut\.json\.gz: its gzip is damaged or cut short"):
        open_samples(DataSettings(data=str(path)))


def test_data_that_changes_at_its_url_is_read_anew():
    fs = fsspec.filesystem("memory")
    settings = DataSettings(data="memory://changing/d.json")
    for count in (2, 3):
        fs.pipe_file("/changing/d.json", json.dumps(SAMPLES[:count]).encode())
        assert len(open_samples(settings)) == count


@pytest.mark.parametrize("reference", ["../secret.png", "/etc/passwd", "a/../../b.png", "x::file:///etc/passwd", "."])
def test_a_reference_cannot_lead_out_of_an_image_folder_at_a_url(reference):
    with pytest.raises(SampleError, match="outside the image folder"):
        place_of("s3://bucket/images", reference)


def test_chained_urls_are_refused():
    with pytest.raises(ConfigError, match="chained"):
        open_samples(DataSettings(data="zip://d.json::file:///etc/passwd"))


@pytest.mark.s3
def test_a_store_that_does_not_answer_is_no_fault_of_the_data(s3, s3_url, tmp_path, monkeypatch):
    from alignkd.cache_store.storage.remote import RemoteStorage
    from alignkd.pipeline.data.files import remote

    monkeypatch.setattr(RemoteStorage, "first_wait_s", 0.01)
    remote._storage.cache_clear()
    fs, root = fsspec.core.url_to_fs(s3_url, skip_instance_cache=True)
    fs.pipe_file(f"{root}/d.json", (tmp_path / write_json(SAMPLES, tmp_path)).read_bytes())
    fs.pipe_file(f"{root}/0.png", (IMAGES / "0.png").read_bytes())
    s3.fail("500", times=1)  # once is tried again
    samples = open_samples(DataSettings(data=f"{s3_url}/d.json", images=s3_url))
    s3.fail("500", times=100)
    with pytest.raises(TransientError):
        read_place(samples[0].places[0])
    s3.reset()
    assert read_place(samples[0].places[0]) == (IMAGES / "0.png").read_bytes()
    s3.fail("500", times=100)
    assert read_place(samples[0].places[0]) == (IMAGES / "0.png").read_bytes()  # its copy is there
    with pytest.raises(TransientError):
        open_samples(DataSettings(data=f"{s3_url}/other.json"))
    s3.reset()
    with pytest.raises(DataError, match=r"other\.json: there is no such file"):
        open_samples(DataSettings(data=f"{s3_url}/other.json"))
