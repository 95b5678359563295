"""``alignkd cache ...`` and the cache formats and places, from end to end through the installed entry point."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time

import pytest
from tiny_runs import IMAGES, SAMPLES, STUDENT, TEACHER, content, metrics, numbered, record, wait_until, write_cache, write_data

MACHINE = ["--images", IMAGES, "--device", "cpu"]
MISSING = [record(f"bad{i}", f"none{i}.png", "<image>\nWhat?", "This.") for i in range(3)]


def ok(door, *arguments):
    finished = door(*arguments)
    assert finished.code == 0, finished.stderr
    assert "Traceback" not in finished.stderr
    return finished.stdout


def figures(door, *arguments):
    return json.loads(ok(door, *arguments, "--json"))


def stage_one(data, cache, *more):
    return ["cache-teacher", "--teacher", TEACHER, "--data", data, "--cache", cache, "--shard-samples", 2, *MACHINE, *more]


def stage_two(data, cache, out):
    return ["distill", "--student", STUDENT, "--cache", cache, "--data", data, "--out", out, *MACHINE, *TRAINING]


TRAINING = ["--batch-size", 2, "--learning-rate", "1e-3", "--epochs", 4, "--max-steps", 2, "--log-steps", 1, "--workers", 0]


def losses(out):
    return [line["loss"] for line in metrics(out)]


def test_status_of_a_running_cache_shows_how_far_it_is_and_disturbs_nobody(door, tmp_path):
    data = write_data(tmp_path / "many.json", numbered(12))
    running = door.start(*stage_one(data, tmp_path / "cache"))
    wait_until(lambda: len(list((tmp_path / "cache" / "commits").glob("0*.json"))) >= 2)
    os.kill(running.pid, signal.SIGSTOP)
    status = figures(door, "cache", "status", tmp_path / "cache")
    os.kill(running.pid, signal.SIGCONT)
    assert running.finish().code == 0
    assert 2 <= status["shards_done"] < status["shards"] == 6
    assert (status["complete"], status["recent_workers"]) == (False, 1)
    assert status["samples_done"] == 2 * status["shards_done"]
    left = status["samples"] - status["samples_done"]
    assert status["seconds_left"] == pytest.approx(left / status["recent_samples_per_second"], rel=0.01, abs=0.06)
    assert figures(door, "cache", "status", tmp_path / "cache")["complete"]


def test_status_writes_every_rejected_sample_to_a_file(door, tmp_path):
    data = write_data(tmp_path / "d.json", [MISSING[0], SAMPLES[4], MISSING[1], MISSING[2]])
    ok(door, *stage_one(data, tmp_path / "cache", "--format", "webdataset"))
    words = ok(door, "cache", "status", tmp_path / "cache", "--rejected", tmp_path / "rejected.jsonl")
    assert re.search(r"samples +1 +0 +3 +4\n", words)
    rejected = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert {entry["id"] for entry in rejected} == {"bad0", "bad1", "bad2"}
    assert all(f"none{entry['id'][3:]}.png" in entry["reason"] and len(entry["key"]) == 32 for entry in rejected)


def test_verify_ends_with_exit_code_2_for_any_problem_and_0_for_a_cache_that_is_merely_not_done(door, tmp_path, cache):
    shutil.copytree(cache, tmp_path / "cache")
    (tmp_path / "cache" / "commits" / "000001.json").unlink()
    report = figures(door, "cache", "verify", tmp_path / "cache")
    assert (report["problems"], report["incomplete"], report["rows"], len(report["strays"])) == ([], 1, 4, 1)
    (tmp_path / "cache" / "shards" / "mine.txt").write_text("x")
    for arguments in ([], ["--quick"], ["--json"]):
        finished = door("cache", "verify", tmp_path / "cache", *arguments)
        assert finished.code == 2
        assert "shards/mine.txt: neither a shard nor a record" in finished.stdout
        assert "Traceback" not in finished.stderr


@pytest.mark.slow
def test_repair_drops_what_is_damaged_and_stage_one_rebuilds_the_same_content(door, tmp_path, data, cache):
    damaged = tmp_path / "cache"
    ok(door, *stage_one(data, damaged))
    shard = sorted((damaged / "shards").iterdir())[0]
    shard.write_bytes(shard.read_bytes()[:-9])
    (damaged / "commits" / "000002.json").write_text("{}")
    assert door("cache", "verify", damaged).code == 2
    words = ok(door, "cache", "repair", damaged)
    assert f"removed: shards/{shard.name}" in words
    assert words.splitlines()[-1] == "shards to do: 2; run alignkd cache-teacher again"
    assert figures(door, *stage_one(data, damaged))["new_samples"] == 4
    assert ok(door, "cache", "verify", damaged).splitlines()[-1] == f"content sha256: {content(cache)}"
    os.utime(damaged / "shards" / shard.name, (0, 0))
    repaired = figures(door, "cache", "repair", damaged, "--min-age", 0)
    assert (repaired["problems"], repaired["shards_to_do"]) == ([], 0)
    assert content(damaged) == content(cache)


def test_repair_leaves_young_strays_to_the_workers_that_are_about_to_commit_them(door, tmp_path, cache):
    shutil.copytree(cache, tmp_path / "cache")
    (tmp_path / "cache" / "commits" / "000001.json").unlink()
    (stray,) = figures(door, "cache", "verify", tmp_path / "cache")["strays"]
    assert figures(door, "cache", "repair", tmp_path / "cache")["removed"] == []
    hours_ago = time.time() - 4000
    os.utime(tmp_path / "cache" / stray, (hours_ago, hours_ago))
    assert figures(door, "cache", "repair", tmp_path / "cache")["removed"] == [stray]


def test_convert_there_and_back_keeps_content_and_rejected_samples(door, tmp_path):
    data = write_data(tmp_path / "d.json", [MISSING[0], *SAMPLES[3:6]])
    write_cache(data, tmp_path / "zarr")
    there = figures(door, "cache", "convert", tmp_path / "zarr", tmp_path / "tar")
    back = figures(door, "cache", "convert", tmp_path / "tar", tmp_path / "back", "--format", "zarr")
    assert (there["format"], back["format"]) == ("webdataset", "zarr")
    assert [there["rejected"], back["rejected"]] == [figures(door, "cache", "status", tmp_path / "zarr")["rejected"]] * 2
    assert content(tmp_path / "tar") == content(tmp_path / "back") == content(tmp_path / "zarr")
    shards = [sorted((path.name, path.read_bytes()) for path in (tmp_path / c / "shards").iterdir()) for c in ("zarr", "back")]
    assert shards[0] == shards[1]


def test_a_conversion_that_was_stopped_goes_on(door, tmp_path, cache):
    ok(door, "cache", "convert", cache, tmp_path / "tar")
    (tmp_path / "tar" / "commits" / "000001.json").unlink()
    assert figures(door, "cache", "convert", cache, tmp_path / "tar")["complete"]
    assert content(tmp_path / "tar") == content(cache)
    finished = door("cache", "convert", cache, tmp_path / "tar", "--format", "zarr")
    assert finished.code == 2
    assert 'format: cache has "webdataset", wanted "zarr"' in finished.stderr


@pytest.mark.slow
def test_a_webdataset_cache_from_stage_one_to_a_trained_student(door, tmp_path, data, cache):
    made = figures(door, *stage_one(data, tmp_path / "tar", "--format", "webdataset"))
    assert (made["format"], made["complete"]) == ("webdataset", True)
    assert {path.suffix for path in (tmp_path / "tar" / "shards").iterdir()} == {".tar"}
    assert content(tmp_path / "tar") == content(cache)
    assert figures(door, *stage_two(data, tmp_path / "tar", tmp_path / "out"))["steps"] == 2
    assert figures(door, *stage_two(data, cache, tmp_path / "other"))["steps"] == 2
    assert losses(tmp_path / "out") == losses(tmp_path / "other")


@pytest.mark.slow
def test_a_cache_on_an_object_store_from_stage_one_to_a_trained_student(door, tmp_path, data, cache, run, s3_url):
    for rank in range(2):
        worker = ["--rank", rank, "--world-size", 2]
        assert figures(door, *stage_one(data, s3_url, *worker))["new_samples"] == (4, 2)[rank]
    status = figures(door, "cache", "status", s3_url)
    assert (status["cache"], status["complete"], status["samples_done"]) == (s3_url, True, 6)
    assert ok(door, "cache", "verify", s3_url).splitlines()[-1] == f"content sha256: {content(cache)}"
    assert figures(door, *stage_two(data, s3_url, tmp_path / "out"))["steps"] == 2
    assert losses(tmp_path / "out")[0] == losses(run)[0]


def test_rank_and_world_size_may_come_from_the_launcher(door, tmp_path, data, monkeypatch):
    for name, value in {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_MAX": "6"}.items():
        monkeypatch.setenv(name, value)
    made = figures(door, *stage_one(data, tmp_path / "cache"))
    assert (made["worker"], made["new_samples"], made["shards_done"]) == ("1/3", 2, 1)
    refused = door(*stage_one(data, tmp_path / "cache", "--rank", 1))
    assert refused.code == 2
    assert "--rank and --world-size are given together" in refused.stderr
