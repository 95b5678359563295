"""Rounds on the tiny checkpoints: every step runs, and a run that is killed anywhere ends with the same student."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_rounds import SECTIONS
from tiny_runs import IMAGES, metrics, numbered, write_data

from alignkd.cache_store.protocol.maintenance.verify import verify
from alignkd.cli import main
from alignkd.pipeline.config.rounds import RoundsConfig
from alignkd.pipeline.rounds import run as rounds


@pytest.fixture
def settings(tmp_path):
    path = tmp_path / "rounds.yaml"
    path.write_text(yaml.safe_dump(SECTIONS))
    return path


def weights(out, number):
    return load_file(out / f"round-{number}" / "run" / "student" / "model.safetensors")


@pytest.mark.slow
def test_a_student_learns_from_its_own_answers_and_the_data(tmp_path, settings, monkeypatch):
    data = write_data(tmp_path / "data.json", numbered(12))

    def in_this_process(name, words, stop):
        with pytest.raises(SystemExit) as ended:
            main(list(words[3:]))
        assert not ended.value.code, name

    monkeypatch.setattr(rounds, "run_command", in_this_process)
    config = RoundsConfig(data=str(data), images=str(IMAGES), out=str(tmp_path / "out"), rounds=2, on_policy_share=0.5)
    figures = rounds.run_rounds(config, str(settings), {name: SECTIONS[name] for name in SECTIONS if name != "rounds"})
    out = tmp_path / "out"
    for number, one in enumerate(figures["rounds"], 1):
        assert one["answers"] == 6
        report = verify(out / f"round-{number}" / "cache")
        assert (report.problems, report.incomplete, report.rows) == ([], 0, 6)
        last = metrics(out / f"round-{number}" / "run")[-1]
        assert last["samples_written"] == 6
        # Of the data, half of the samples: the weight of each is the rest of the share.
        assert last["samples"] == 12
    first, second = weights(out, 1), weights(out, 2)
    assert any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.processes
def test_rounds_that_are_killed_anywhere_end_with_the_same_student(tmp_path, settings):
    data = write_data(tmp_path / "data.json", numbered(12))

    def command(out, *more):
        given = ["--settings", settings, "--data", data, "--images", IMAGES, "--out", out, "--json", *more]
        return [sys.executable, "-m", "alignkd", "rounds", *map(str, given)]

    whole = subprocess.run(command(tmp_path / "whole"), capture_output=True, text=True, check=False)
    assert whole.returncode == 0, whole.stderr
    out, draw = tmp_path / "killed", random.Random(5)
    for attempt in range(12):
        more = ["--resume"] if (out / "rounds.json").exists() else []
        # What a step leaves running when the rounds are killed ends by itself, or with its group.
        process = subprocess.Popen(command(out, *more), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            process.wait(draw.uniform(8, 25) if attempt < 4 else 600)
            break
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGTERM if attempt % 2 else signal.SIGKILL)
            process.wait()
            time.sleep(0.5)
    assert process.returncode == 0, process.stderr.read()
    done = json.loads((out / "rounds.json").read_text())["done"]
    assert len(done) == len(set(done)) == 7
    for number in (1, 2):
        for name, value in weights(tmp_path / "whole", number).items():
            assert torch.equal(weights(out, number)[name], value), name
