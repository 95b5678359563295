"""The command line about rejected samples: none usable is a failure, a share limits them, and they can be tried again."""

from __future__ import annotations

import json
import shutil

import pytest
from tiny_runs import IMAGES, SAMPLES, STUDENT, TEACHER, content, record, write_cache, write_data

from alignkd.errors import ConfigError
from alignkd.pipeline.config.evaluate import EvaluateConfig
from alignkd.pipeline.config.targets import TargetSettings
from alignkd.pipeline.data.rejected_samples import RejectedSamples, TooManyRejectedError, allowed_rejections

MISSING = [record(f"s{i}", f"{i}.jpg", "<image>\nWhat?", "This.") for i in range(3)]
WITHOUT_LOGITS = ("--targets", "attention,vision")


def cache_teacher(data, cache, images, *more):
    given = {
        "--teacher": TEACHER,
        "--data": data,
        "--images": images,
        "--cache": cache,
        "--device": "cpu",
        "--shard-samples": 2,
    }
    return ["cache-teacher", *(word for pair in given.items() for word in pair), *more]


def command_lines(data, tmp_path):
    distill = {"--student": STUDENT, "--recipe": "sft", "--out": tmp_path / "run", "--batch-size": 2, "--epochs": 1}
    evaluate = {"--model": STUDENT}
    shared = {"--data": data, "--images": IMAGES, "--device": "cpu"}
    return {
        "cache-teacher": cache_teacher(data, tmp_path / "cache", IMAGES),
        "distill": ["distill", *(word for pair in (distill | shared).items() for word in pair)],
        "evaluate": ["evaluate", *(word for pair in (evaluate | shared).items() for word in pair)],
    }


@pytest.mark.parametrize("command", ["cache-teacher", "distill", "evaluate"])
def test_no_usable_sample_is_exit_code_2_with_the_reasons_by_count(door, tmp_path, command):
    data = write_data(tmp_path / "d.json", MISSING)
    ended = door(*command_lines(data, tmp_path)[command])
    assert ended.code == 2, ended.stderr
    assert "none of 3 samples can be used: 3 image missing. First: s" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_an_image_that_arrives_later_is_in_the_cache_as_if_it_had_always_been_there(door, tmp_path):
    data, images = write_data(tmp_path / "d.json", SAMPLES), tmp_path / "images"
    shutil.copytree(IMAGES, images)
    (images / "1.png").unlink()
    command = cache_teacher(data, tmp_path / "cache", images, *WITHOUT_LOGITS)
    assert door(*command).code == 0
    assert door("cache", "repair", tmp_path / "cache").stdout == "shards to do: 0\n"
    unknown = door("cache", "repair", tmp_path / "cache", "--retry-rejected", "weather")
    assert (unknown.code, "known reasons are image missing" in unknown.stderr) == (2, True)
    assert "try again: none\nshards to do: 0" in door("cache", "repair", tmp_path / "cache", "--retry-rejected", "text").stdout
    for more in (["image missing"], []):
        repaired = door("cache", "repair", tmp_path / "cache", "--retry-rejected", *more)
        assert (
            repaired.stdout
            == "rejected samples to try again: 1 image missing\nshards to do: 1; run alignkd cache-teacher again\n"
        )
    assert "1 shard to be made again" in door("cache", "status", tmp_path / "cache").stdout
    figures = json.loads(door("cache", "status", tmp_path / "cache", "--json").stdout)
    assert (figures["complete"], len(figures["shards_to_retry"])) == (False, 1)
    shutil.copyfile(IMAGES / "1.png", images / "1.png")
    assert door(*command).code == 0
    figures = json.loads(door("cache", "status", tmp_path / "cache", "--json").stdout)
    assert (figures["complete"], figures["shards_to_retry"]) == (True, [])
    write_cache(data, tmp_path / "whole", settings=TargetSettings(targets=("attention", "vision")))
    assert content(tmp_path / "cache") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("limit", "samples", "allowed"),
    [(0, 1000, 0), (7, 10, 7), ("1%", 100, 10), ("1%", 5000, 50), ("0.5%", 10_000, 50), ("0%", 10_000, 10), ("100%", 40, 40)],
)
def test_a_number_is_taken_as_it_is_and_a_share_allows_ten_at_least(limit, samples, allowed):
    assert allowed_rejections(limit, samples) == allowed
    rejects = RejectedSamples(limit, samples + 1)
    for i in range(allowed):
        rejects.add(f"s{i}", "text")
    if allowed < samples:
        with pytest.raises(
            TooManyRejectedError, match=f"{allowed + 1} samples cannot be used, more than --max-rejected {limit}"
        ):
            rejects.add("one more", "text")


@pytest.mark.parametrize("limit", ["101%", "-1%", "%", "1", "one", "1e1%", "nan%", "1%%", "\u0661%"])
def test_what_is_no_share_is_refused(door, limit):
    with pytest.raises(ConfigError, match="--max-rejected is"):
        EvaluateConfig(model="m", data="d", max_rejected=limit)
    if limit != "1":
        refused = door("evaluate", "--model", "m", "--data", "d", "--max-rejected", limit)
        assert (refused.code, "Traceback" in refused.stderr) == (2, False)


def test_a_sample_that_comes_again_in_every_epoch_counts_once():
    rejects = RejectedSamples(1, 10)
    for _ in range(3):
        rejects.add("a", "image a: No such file or directory", key="k")
    assert (rejects.count, dict(rejects.by_class)) == (1, {"image missing": 1})
