"""Stage one stopped, crashed, started again with other workers, and run twice at once: the same cache."""

from __future__ import annotations

import itertools
import os
import shutil
import signal

import pytest
from tiny_runs import IMAGES, SAMPLES, TEACHER, content, numbered, wait_until, write_cache, write_data

from alignkd.cache_store.protocol import store as store_module
from alignkd.cache_store.protocol.store import CacheStore, open_store
from alignkd.pipeline.runtime.signals import Interrupted
from alignkd.pipeline.stage_one.teacher_stage import StageOne


@pytest.fixture(scope="module")
def twelve(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("twelve") / "data.json", numbered(12))


@pytest.fixture(scope="module")
def expected(twelve, tmp_path_factory):
    """The content of twelve samples in shards of two, by one undisturbed worker."""
    cache = tmp_path_factory.mktemp("expected") / "cache"
    write_cache(twelve, cache)
    return content(cache)


def stop_after(shards, monkeypatch):
    """Have SIGTERM come while the images of the shard after those are read."""
    calls, real = itertools.count(1), StageOne.load

    def load(self, items):
        # Without a codec it is the calibration that reads.
        if self.logit_codec is not None and next(calls) > shards:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, items)

    monkeypatch.setattr(StageOne, "load", load)


@pytest.mark.parametrize("shards", [0, 1, 2])
def test_a_stopped_run_goes_on_with_what_is_left_and_ends_with_the_same_content(tmp_path, data, cache, monkeypatch, shards):
    with monkeypatch.context() as patch:
        stop_after(shards, patch)
        with pytest.raises(Interrupted, match=r"stopped by SIGTERM; run the same command again"):
            write_cache(data, tmp_path / "cache")
    assert open_store(tmp_path / "cache").status().shards_done == shards
    done = write_cache(data, tmp_path / "cache")
    assert done["new_samples"] == 6 - 2 * shards
    assert done["complete"]
    assert content(tmp_path / "cache") == content(cache)
    assert write_cache(data, tmp_path / "cache")["new_samples"] == 0


def test_a_crash_between_shard_and_record_leaves_nothing_that_counts(tmp_path, data, cache, monkeypatch):
    def crash(storage, record, payload):
        storage.write(record.object, payload[:100])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "commit", crash)
        with pytest.raises(KeyboardInterrupt):
            write_cache(data, tmp_path / "cache")
    assert open_store(tmp_path / "cache").status().shards_done == 0
    assert write_cache(data, tmp_path / "cache")["new_samples"] == 6
    assert content(tmp_path / "cache") == content(cache)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_ends_the_real_process_with_exit_code_75_and_a_rerun_completes_the_same_cache(
    tmp_path, door, twelve, expected, name
):
    arguments = ["cache-teacher", "--teacher", TEACHER, "--data", twelve, "--images", IMAGES, "--device", "cpu"]
    arguments += ["--shard-samples", 2, "--cache", tmp_path / "cache"]
    commits = tmp_path / "cache" / "commits"
    running = door.start(*arguments)
    wait_until(lambda: list(commits.glob("0*.json")))
    os.kill(running.pid, signal.Signals[name])
    stopped = running.finish()
    assert stopped.code == 75, stopped.stderr
    assert f"stopped by {name}; run the same command again to continue" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    before = len(list(commits.glob("0*.json")))
    assert 1 <= before < 6
    rest = write_cache(twelve, tmp_path / "cache")
    assert (rest["new_samples"], rest["complete"]) == (12 - 2 * before, True)
    assert content(tmp_path / "cache") == expected


@pytest.mark.slow
@pytest.mark.parametrize("second", [2, 5])
def test_any_other_number_of_workers_takes_exactly_what_is_left(tmp_path, twelve, expected, second):
    cache = tmp_path / "cache"
    assert write_cache(twelve, cache, rank=1, world_size=3)["new_samples"] == 4
    left = open_store(cache).pending()
    assert left == [0, 2, 3, 5]
    for rank in range(second):
        done = write_cache(twelve, cache, rank=rank, world_size=second)
        assert done["new_samples"] == 2 * sum(shard % second == rank for shard in left)
    assert done["complete"]
    assert content(cache) == expected


@pytest.mark.slow
def test_who_steals_completes_the_cache_alone(tmp_path, twelve, expected):
    done = write_cache(twelve, tmp_path / "cache", rank=1, world_size=3, steal=True)
    assert (done["new_samples"], done["complete"]) == (12, True)
    assert content(tmp_path / "cache") == expected


@pytest.mark.slow
def test_the_content_depends_on_neither_format_nor_shard_size_nor_order_nor_threads(tmp_path, twelve):
    """One sample a forward pass: other batches round differently, in the last bit."""
    one = {"batch_tokens": 1}
    write_cache(twelve, tmp_path / "a", **one)
    write_cache(twelve, tmp_path / "b", **one, shard_samples=5, shard_format="webdataset", host_threads=1)
    write_cache(write_data(tmp_path / "back.json", numbered(12)[::-1]), tmp_path / "c", **one, shard_samples=4)
    assert content(tmp_path / "a") == content(tmp_path / "b") == content(tmp_path / "c")


def test_what_does_not_change_the_targets_may_change_between_runs(tmp_path, twelve):
    cache = tmp_path / "cache"
    write_cache(twelve, cache, rank=0, world_size=2)
    moved = tmp_path / "moved" / "elsewhere.json"
    moved.parent.mkdir()
    shutil.copyfile(twelve, moved)
    assert write_cache(moved, cache, batch_tokens=400, max_rejected=3, host_threads=1)["complete"]


def test_a_straggler_that_finishes_after_its_replacement_harms_nobody(tmp_path, data, cache, monkeypatch):
    real, nested = CacheStore.commit_shard, []

    def commit_shard(self, number, *arguments, **keywords):
        if not nested:
            nested.append(number)
            assert write_cache(data, tmp_path / "cache")["new_samples"] == 6
        return real(self, number, *arguments, **keywords)

    monkeypatch.setattr(CacheStore, "commit_shard", commit_shard)
    assert write_cache(data, tmp_path / "cache")["complete"]
    assert content(tmp_path / "cache") == content(cache)


@pytest.mark.slow
@pytest.mark.processes
def test_a_stopped_worker_that_wakes_after_its_shards_were_taken_harms_nobody(tmp_path, door, twelve, expected):
    arguments = ["cache-teacher", "--teacher", TEACHER, "--data", twelve, "--images", IMAGES, "--device", "cpu"]
    arguments += ["--shard-samples", 2, "--cache", tmp_path / "cache", "--world-size", 2]
    stopped = door.start(*arguments, "--rank", 0)
    wait_until(lambda: list((tmp_path / "cache" / "commits").glob("0*.json")))
    os.kill(stopped.pid, signal.SIGSTOP)
    thief = door(*arguments, "--rank", 1, "--steal")
    assert thief.code == 0, thief.stderr
    assert content(tmp_path / "cache") == expected
    os.kill(stopped.pid, signal.SIGCONT)
    woken = stopped.finish()
    assert woken.code == 0, woken.stderr
    assert "Traceback" not in woken.stderr
    assert content(tmp_path / "cache") == expected


@pytest.mark.slow
@pytest.mark.processes
def test_identical_workers_at_once_harm_nobody(tmp_path, door, twelve, expected):
    arguments = ["cache-teacher", "--teacher", TEACHER, "--data", twelve, "--images", IMAGES, "--device", "cpu"]
    arguments += ["--shard-samples", 2, "--cache", tmp_path / "cache", "--rank", 0, "--world-size", 1]
    running = [door.start(*arguments) for _ in range(2)]
    for finished in [worker.finish() for worker in running]:
        assert finished.code == 0, finished.stderr
    assert content(tmp_path / "cache") == expected


def half_done(data, cache):
    """Shards 0 and 2 of three are committed, shard 1 with samples 2 and 3 is left."""
    write_cache(data, cache, rank=0, world_size=2)
    assert open_store(cache).pending() == [1]


def test_resuming_reads_the_samples_that_are_left_and_no_others(tmp_path, data, cache, monkeypatch):
    half_done(data, tmp_path / "cache")
    reads, real = [], os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, at: reads.append((at, size)) or real(file, size, at))
    monkeypatch.setattr("alignkd.pipeline.data.records.read_records", lambda *_: pytest.fail("the whole data file was read"))
    assert write_cache(data, tmp_path / "cache")["complete"]
    plan = open_store(tmp_path / "cache").plan
    assert reads == [(int(plan.extras["starts"][i]), int(plan.extras["lengths"][i])) for i in (2, 3)]
    assert content(tmp_path / "cache") == content(cache)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["a letter", "the place"])
def test_a_data_file_of_the_same_size_that_has_changed_is_refused(tmp_path, data, change):
    copy = tmp_path / "data.json"
    text = data.read_bytes()
    copy.write_bytes(text + b" " * 8)
    half_done(copy, tmp_path / "cache")
    name = SAMPLES[2]["id"].encode()
    assert text.count(name) == 1
    copy.write_bytes(text.replace(name, name.swapcase()) + b" " * 8 if change == "a letter" else b" " * 8 + text)
    with pytest.raises(
        ValueError, match=r"data\.json.*the file has changed since it was indexed; restore it, or write another"
    ):
        write_cache(copy, tmp_path / "cache")
    copy.write_bytes(text + b" " * 8)
    assert write_cache(copy, tmp_path / "cache")["complete"]


@pytest.mark.parametrize("layout", ["indented", "lines"])
def test_a_data_file_of_other_size_with_the_same_samples_goes_on(tmp_path, data, cache, layout):
    half_done(data, tmp_path / "cache")
    other = write_data(tmp_path / "other.json", SAMPLES, indent=2) if layout == "indented" else tmp_path / "other.jsonl"
    if layout == "lines":
        other.write_text("".join(write_data(tmp_path / "one.json", [r]).read_text()[1:-1] + "\n" for r in SAMPLES))
    assert other.stat().st_size != data.stat().st_size
    done = write_cache(other, tmp_path / "cache")
    assert (done["new_samples"], done["complete"]) == (2, True)
    assert content(tmp_path / "cache") == content(cache)


def test_a_data_file_of_other_samples_is_refused_with_both_digests(tmp_path, data):
    half_done(data, tmp_path / "cache")
    other = write_data(tmp_path / "other.json", SAMPLES[:5])
    with pytest.raises(ValueError, match=r'(?s)fingerprint\.data: cache has "\w+.*wanted "\w+.*Write to another --cache'):
        write_cache(other, tmp_path / "cache")
    assert open_store(tmp_path / "cache").pending() == [1]
