"""Under ``python -O`` no ``assert`` runs: no result depends on one."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from tiny_runs import IMAGES, STUDENT, TEACHER, content, student_sha256
from warm_door import WarmDoor

pytestmark = pytest.mark.slow

MACHINE = ["--images", IMAGES, "--device", "cpu"]


@pytest.fixture(scope="module")
def optimized(tmp_path_factory):
    """The real entry point, without assertions."""
    door = WarmDoor(tmp_path_factory.mktemp("optimized"), PYTHONOPTIMIZE="1")
    yield door
    door.close()


def figures(door, *arguments):
    finished = door(*arguments, "--json")
    assert finished.code == 0, finished.stderr
    return json.loads(finished.stdout)


def test_the_variable_turns_assertions_off(monkeypatch):
    monkeypatch.setenv("PYTHONOPTIMIZE", "1")
    subprocess.run([sys.executable, "-c", "assert False"], check=True)


def test_a_sample_is_shown_with_the_same_values(door, optimized, data, tmp_path):
    arguments = ["show", "--model", STUDENT, "--data", data, *MACHINE, "--id", "two5", "--save"]
    assert figures(optimized, *arguments, tmp_path / "a.npz") == figures(door, *arguments, tmp_path / "b.npz")
    found, expected = np.load(tmp_path / "a.npz"), np.load(tmp_path / "b.npz")
    assert set(found) == set(expected)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.parametrize("shard_format", ["zarr", "webdataset"])
def test_both_stages_give_the_same_content_and_the_same_student(optimized, data, cache, run, tmp_path, shard_format):
    arguments = ["cache-teacher", "--teacher", TEACHER, "--data", data, *MACHINE, "--cache", tmp_path / "cache"]
    made = figures(optimized, *arguments, "--shard-samples", 2, "--template", "v1", "--format", shard_format)
    assert (made["new_samples"], made["complete"]) == (6, True)
    assert content(tmp_path / "cache") == content(cache)
    arguments = ["distill", "--student", STUDENT, "--data", data, *MACHINE, "--cache", tmp_path / "cache"]
    arguments += ["--batch-size", 2, "--learning-rate", "1e-3", "--epochs", 4, "--log-steps", 1, "--workers", 0]
    assert figures(optimized, *arguments, "--out", tmp_path / "out")["steps"] == 12
    assert student_sha256(tmp_path / "out") == student_sha256(run)


def test_the_answers_are_the_same(door, optimized, data, tmp_path):
    arguments = ["evaluate", "--model", STUDENT, "--data", data, *MACHINE, "--max-new-tokens", 6, "--out"]
    found, expected = tmp_path / "a", tmp_path / "b"
    assert figures(optimized, *arguments, found)["answered"] == figures(door, *arguments, expected)["answered"] == 6
    assert (found / "predictions.jsonl").read_text() == (expected / "predictions.jsonl").read_text()
