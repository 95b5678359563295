"""The examples run as their docstrings say, in processes of their own."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import IMAGES, STUDENT, TEACHER, metrics

EXAMPLES = Path(__file__).parents[2] / "examples"
PLUGIN = EXAMPLES / "own_term.py"


@pytest.mark.slow
def test_the_objective_on_a_batch_is_a_few_lines_of_the_public_api(data, cache):
    script = EXAMPLES / "objective_on_a_batch.py"
    options = {"--student": STUDENT, "--cache": cache, "--data": data, "--images": IMAGES}
    words = [str(word) for pair in options.items() for word in pair]
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"loss \d+\.\d+ .*'attention': ", done.stdout)
    code = script.read_text().partition('"""\n\n')[2]
    assert len([line for line in code.splitlines() if line.strip()]) < 20


def distill(door, data, cache, out, *more):
    options = ["--student", STUDENT, "--cache", cache, "--data", data, "--images", IMAGES, "--out", out, "--device", "cpu"]
    return door("distill", *options, "--batch-size", 2, "--log-steps", 1, "--save-steps", 2, *more)


def test_a_term_from_a_plugin_trains_with_the_student_and_is_recorded(door, data, cache, tmp_path):
    out, plugin = tmp_path / "out", ["--plugin", PLUGIN, "--set", "mean_token_angle=0.5"]
    done = distill(door, data, cache, out, *plugin, "--max-steps", 4, "--learning-rate", "1e-2", "--workers", 1)
    assert done.code == 0, done.stderr
    lines = metrics(out)
    assert [line["weighted/mean_token_angle"] for line in lines] == pytest.approx(
        [line["mean_token_angle"] / 2 for line in lines]
    )
    recorded = json.loads((out / "run.json").read_text())
    assert recorded["plugins"] == [{"path": str(PLUGIN), "sha256": hashlib.sha256(PLUGIN.read_bytes()).hexdigest()}]
    assert recorded["configuration"]["recipe"]["extra"] == {"mean_token_angle": 0.5}


@pytest.mark.slow
def test_a_run_with_a_plugin_is_not_resumed_without_it_or_with_another(door, data, cache, tmp_path):
    out, other = tmp_path / "out", shutil.copy(PLUGIN, tmp_path / "other.py")
    weight = ["--set", "mean_token_angle=0.5", "--max-steps", 4]
    assert distill(door, data, cache, out, "--plugin", PLUGIN, *weight).code == 0
    shutil.rmtree(out / "checkpoints" / "checkpoint-4")
    assert distill(door, data, cache, out, "--plugin", other, *weight, "--resume").code == 0  # the same file elsewhere
    Path(other).write_text(Path(other).read_text() + "\n")
    refused = distill(door, data, cache, out, "--plugin", other, *weight, "--resume")
    assert (refused.code, "plugin_sha256" in refused.stderr) == (2, True), refused.stderr
    unknown = distill(door, data, cache, tmp_path / "none", *weight)
    assert unknown.code == 2
    assert "'mean_token_angle' is no" in unknown.stderr
    assert "Traceback" not in unknown.stderr


def test_a_metric_from_a_plugin_judges_answers(door, data, tmp_path):
    options = ["--model", TEACHER, "--data", data, "--images", IMAGES, "--device", "cpu", "--max-new-tokens", 2, "--json"]
    done = door("evaluate", *options, "--plugin", PLUGIN, "--metric", "first_word")
    assert json.loads(done.stdout)["metric"] == "first_word", done.stderr
    refused = door("evaluate", *options, "--metric", "first_word")
    assert (refused.code, "known are exact, contains" in refused.stderr) == (2, True)
