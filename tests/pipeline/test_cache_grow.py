"""A cache that grows, joins another and gives a part, through the real entry point: the content of one written at once."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
from tiny_runs import (
    IMAGES,
    TEACHER,
    content,
    numbered,
    stage_one_config,
    train,
    wait_until,
    with_other_weights,
    write_cache,
    write_data,
)

from alignkd.cache_store.errors import FingerprintMismatchError
from alignkd.cache_store.protocol.maintenance.merge import plan_merge
from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.cache_store.protocol.store import open_store
from alignkd.errors import CacheError, ConfigError
from alignkd.pipeline.cache_admin.repacking import merge_with_progress
from alignkd.pipeline.stage_one.dry_run import dry_run

OLD = 8
RECORDS = numbered(12)
"""The first eight fill four shards of two, and no image is shared with the last four."""


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Data files, and a cache of the old samples, at default settings."""
    folder = tmp_path_factory.mktemp("grow")
    for name, records in {"old": RECORDS[:OLD], "new": RECORDS[OLD:], "all": RECORDS}.items():
        write_data(folder / f"{name}.json", records)
    write_cache(folder / "old.json", folder / "cache")
    return folder


@pytest.fixture(scope="module")
def at_once(parts):
    """The content of the same samples in one cache."""
    write_cache(parts / "all.json", parts / "at-once", calibration_from=str(parts / "cache"))
    return content(parts / "at-once")


@pytest.fixture
def cache(parts, tmp_path):
    """A copy of the cache of the old samples."""
    return shutil.copytree(parts / "cache", tmp_path / "cache")


def append(cache, data, *more):
    given = ["--teacher", TEACHER, "--images", IMAGES, "--device", "cpu", "--json"]
    return ["cache", "append", "--cache", cache, "--data", data, *given, *more]


def figures(finished):
    assert finished.code == 0, finished.stderr
    return json.loads(finished.stdout)


def test_new_samples_are_appended_and_nothing_is_made_twice(door, parts, cache, at_once):
    before = {path: path.read_bytes() for path in cache.glob("[scp]*/*")}
    found = figures(door(*append(cache, parts / "all.json")))
    assert (found["new_samples"], found["samples"], found["plans"], found["complete"]) == (4, 12, 2, True)
    assert before.items() <= {path: path.read_bytes() for path in cache.glob("[scp]*/*")}.items()
    assert content(cache) == at_once
    again = figures(door(*append(cache, parts / "new.json")))
    assert (again["new_samples"], again["plans"]) == (0, 2)
    assert content(cache) == at_once


@pytest.mark.slow
def test_other_settings_are_refused_and_those_not_given_are_the_caches(door, parts, tmp_path):
    cache = tmp_path / "cache"
    write_cache(parts / "old.json", cache, max_length=1000, shard_format="webdataset", attention_layers="last")
    refused = door(*append(cache, parts / "new.json", "--max-length", 2048))
    assert refused.code == 2
    assert "max_length: cache has 1000, wanted 2048" in refused.stderr
    refused = door(*append(cache, parts / "new.json", "--format", "zarr"))
    assert (refused.code, 'format: cache has "webdataset", wanted "zarr"' in refused.stderr) == (2, True)
    assert json.loads((cache / "cache.json").read_text())["format_version"] == 3
    assert figures(door(*append(cache, parts / "new.json")))["new_samples"] == 4
    assert len(CacheReader(cache)) == 12


def test_another_teacher_and_no_cache_are_refused(parts, cache, tmp_path):
    teacher = with_other_weights(TEACHER, tmp_path / "teacher")
    with pytest.raises(FingerprintMismatchError, match=r"teacher\.weights"):
        write_cache(parts / "new.json", cache, teacher=str(teacher), append=True)
    assert len(open_store(cache).plan.parts) == 1
    with pytest.raises(CacheError, match="no cache at"):
        write_cache(parts / "new.json", tmp_path / "none", append=True)
    with pytest.raises(FingerprintMismatchError, match="run alignkd cache append"):
        write_cache(parts / "all.json", cache)


def test_stage_one_continues_its_own_data_after_an_append(parts, tmp_path, at_once):
    cache = tmp_path / "cache"
    write_cache(parts / "old.json", cache, calibration_from=str(parts / "cache"), rank=0, world_size=2)
    write_cache(parts / "new.json", cache, append=True)
    assert len(open_store(cache).pending()) == 2
    figures_of_rest = write_cache(parts / "old.json", cache)
    assert (figures_of_rest["new_samples"], figures_of_rest["complete"]) == (4, True)
    assert content(cache) == at_once


def test_shards_of_other_data_are_left_to_those_who_have_it(parts, cache):
    write_cache(parts / "new.json", cache, append=True, rank=0, world_size=3)
    left = open_store(cache).pending()
    assert left
    assert write_cache(parts / "old.json", cache, append=True)["new_samples"] == 0
    assert open_store(cache).pending() == left
    assert write_cache(parts / "new.json", cache, append=True)["complete"]


def test_another_calibration_is_refused(parts, cache, tmp_path):
    write_cache(parts / "new.json", tmp_path / "other")
    with pytest.raises(ConfigError, match="started with another calibration"):
        write_cache(parts / "old.json", cache, calibration_from=str(tmp_path / "other"))
    with pytest.raises(FingerprintMismatchError, match="max_length"):
        write_cache(parts / "old.json", tmp_path / "third", max_length=99, calibration_from=str(cache))
    with pytest.raises(CacheError, match=r"other tensors .* --calibration-from"):
        plan_merge([cache, tmp_path / "other"])


def test_a_dry_run_estimates_the_new_samples_alone(parts, cache):
    found = dry_run(stage_one_config(parts / "all.json", cache, append=True))
    assert (found["samples"], found["shards"], found["tensor_bytes"]) == (4, 2, 0)
    assert len(open_store(cache).plan.parts) == 1


@pytest.mark.slow
def test_caches_merge_and_give_parts_at_default_settings(door, parts, cache, at_once, tmp_path):
    write_cache(parts / "new.json", tmp_path / "new", calibration_from=str(cache), shard_format="webdataset")
    assert figures(door("cache", "merge", cache, tmp_path / "new", tmp_path / "m", "--json"))["complete"]
    assert content(tmp_path / "m") == at_once
    found = figures(door("cache", "subset", tmp_path / "m", tmp_path / "old", "--data", parts / "old.json", "--json"))
    assert (found["samples"], found["format"]) == (OLD, "zarr")
    assert content(tmp_path / "old") == content(cache)
    (tmp_path / "ids").write_text("s1\ns9\n\n")
    assert (
        figures(door("cache", "subset", tmp_path / "m", tmp_path / "two", "--ids", tmp_path / "ids", "--json"))["samples"] == 2
    )
    key = next(iter(CacheReader(cache)))
    (tmp_path / "keys").write_text(f"{key}\n")
    figures(door("cache", "subset", cache, tmp_path / "one", "--keys", tmp_path / "keys", "--json"))
    assert list(CacheReader(tmp_path / "one")) == [key]


def test_a_cache_without_vision_tokens_keeps_no_projector_as_one_written_without_them(door, parts, cache, tmp_path):
    figures(door("cache", "subset", cache, tmp_path / "less", "--without", "vision,logits", "--json"))
    fewer = type(stage_one_config(parts / "old.json", tmp_path / "less").settings)(targets=("attention",))
    write_cache(parts / "old.json", tmp_path / "expected", settings=fewer)
    assert not list(CacheReader(tmp_path / "less").tensors)
    assert content(tmp_path / "less") == content(tmp_path / "expected")


def test_a_cache_without_logits_is_one_that_was_written_without_them(door, parts, cache, tmp_path):
    figures(door("cache", "subset", cache, tmp_path / "less", "--without", "logits", "--json"))
    settings = stage_one_config(parts / "old.json", tmp_path / "less").settings
    fewer = type(settings)(targets=("attention", "vision"))
    write_cache(parts / "old.json", tmp_path / "expected", settings=fewer)
    assert content(tmp_path / "less") == content(tmp_path / "expected")
    assert write_cache(parts / "old.json", tmp_path / "less", settings=fewer)["new_samples"] == 0
    with pytest.raises(CacheError, match=r"needs .*logits.* which the cache does not hold"):
        train(parts / "old.json", tmp_path / "less", tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "none of --data, --ids, --keys and --without"),
        (["--ids", "a", "--keys", "b"], "found --ids and --keys, expected one of them"),
        (["--keys", "keys"], "expected a key of 32 characters"),
        (["--ids", "ids"], "no sample of 1 of the 1 ids"),
        (["--ids", "empty"], "found no line with text"),
        (["--ids", "none"], "No such file"),
        (["--without", "attention,vision,logits"], "nothing would be left"),
        (["--without", "sketch"], "known are attention, vision, logits"),
        (["--data", "more.json"], "was never planned to hold 1 of the 1 samples"),
    ],
)
def test_what_is_no_part_is_refused(door, cache, tmp_path, arguments, message):
    (tmp_path / "keys").write_text("abc\n")
    (tmp_path / "ids").write_text("not there\n")
    (tmp_path / "empty").write_text("\n")
    write_data(tmp_path / "more.json", numbered(20)[19:])
    words = [tmp_path / word if (tmp_path / word).exists() or word == "none" else word for word in arguments]
    finished = door("cache", "subset", cache, tmp_path / "to", *words)
    assert (finished.code, (tmp_path / "to").exists()) == (2, False)
    assert message in " ".join(finished.stderr.split())
    assert "Traceback" not in finished.stderr


def test_a_merge_without_room_is_refused_before_anything_is_written(cache, tmp_path, monkeypatch, parts):
    write_cache(parts / "new.json", tmp_path / "new", calibration_from=str(cache))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ConfigError, match="but only 1 kB are free there: make room, or write to another place"):
        merge_with_progress([str(cache), str(tmp_path / "new")], str(tmp_path / "m"), None, None, prefer_first=False)
    assert not (tmp_path / "m").exists()


@pytest.mark.slow
@pytest.mark.processes
def test_many_workers_append_the_same_data_at_once(door, parts, tmp_path, at_once):
    cache = shutil.copytree(parts / "cache", tmp_path / "cache")
    workers = [
        door.start(*append(cache, parts / data, "--rank", rank, "--world-size", 3, *steal))
        for rank, (data, steal) in enumerate([("all.json", []), ("new.json", ["--steal"]), ("all.json", [])])
    ]
    assert [worker.finish().code for worker in workers] == [0, 0, 0]
    assert len(open_store(cache).plan.parts) == 2
    assert content(cache) == at_once


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("after", ["plan/000001.json", "commits/000004.json", "shards"])
def test_an_append_that_is_killed_is_continued(door, parts, tmp_path, at_once, after):
    cache = shutil.copytree(parts / "cache", tmp_path / "cache")
    shards = len(os.listdir(cache / "shards"))
    for _ in range(2):
        running = door.start(*append(cache, parts / "all.json", "--batch-tokens", 16384))
        wait_until(lambda: len(os.listdir(cache / "shards")) > shards if after == "shards" else (cache / after).exists())
        os.kill(running.pid, signal.SIGKILL)
        running.finish()
    assert figures(door(*append(cache, parts / "all.json")))["complete"]
    assert content(cache) == at_once
    assert len(open_store(cache).plan.parts) == 2


@pytest.mark.slow
@pytest.mark.processes
def test_a_merge_and_a_part_that_are_killed_are_continued(door, parts, tmp_path):
    write_data(tmp_path / "more.json", numbered(60)[12:])
    write_cache(tmp_path / "more.json", tmp_path / "more", calibration_from=str(parts / "cache"))
    merge = ["cache", "merge", parts / "cache", tmp_path / "more", tmp_path / "m", "--shard-samples", 1, "--json"]
    subset = ["cache", "subset", tmp_path / "m", tmp_path / "part", "--data", tmp_path / "more.json", "--json"]
    for arguments, target in ((merge, tmp_path / "m"), (subset, tmp_path / "part")):
        running = door.start(*arguments)
        wait_until(lambda target=target: (target / "commits/000003.json").exists())
        os.kill(running.pid, signal.SIGKILL)
        assert running.finish().code == -signal.SIGKILL
        done = len(os.listdir(target / "commits"))
        assert not json.loads(door("cache", "status", target, "--json").stdout)["complete"]
        assert figures(door(*arguments))["complete"]
        assert len(os.listdir(target / "commits")) > done
    assert len(CacheReader(tmp_path / "m")) == 56
    assert content(tmp_path / "part") == content(tmp_path / "more")


@pytest.mark.slow
@pytest.mark.processes
def test_ray_actors_append(door, parts, tmp_path, at_once):
    pytest.importorskip("ray")
    cache = shutil.copytree(parts / "cache", tmp_path / "cache")
    found = figures(door(*append(cache, parts / "new.json", "--engine", "ray", "--ray-workers", 2)))
    assert (found["new_shards"], found["complete"]) == (2, True)
    assert content(cache) == at_once
