"""Stage two stopped, killed and read by other processes: the same student, bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from contextlib import suppress
from random import Random

import pytest
from tiny_runs import (
    IMAGES,
    STUDENT,
    metrics,
    student_sha256,
    train,
    wait_until,
    without_time,
)

from alignkd.cache_store.protocol.maintenance.convert import convert
from alignkd.pipeline.runtime.signals import Interrupted
from alignkd.pipeline.training.callbacks import RunCallback
from alignkd.pipeline.training.checkpoints import RECORD, find_latest, mark_complete, remove_incomplete


def sigterm_at(step, monkeypatch):
    real = RunCallback.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, args, state, control, **kwargs)

    monkeypatch.setattr(RunCallback, "on_step_end", on_step_end)


# The end of an epoch; the others are alike.
STEPS = [step if step == 6 else pytest.param(step, marks=pytest.mark.slow) for step in range(1, 12)]


@pytest.mark.parametrize("step", STEPS)
def test_a_run_stopped_at_any_step_resumes_to_bit_identical_weights_and_metrics(run, data, cache, tmp_path, monkeypatch, step):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        sigterm_at(step, patch)
        with pytest.raises(Interrupted, match=f"stopped by SIGTERM at step {step}; continue with --resume"):
            train(data, cache, out)
    assert [line["step"] for line in metrics(out)] == list(range(1, step + 1))
    assert not (out / "student").exists()
    result = train(data, cache, out, resume=True)
    assert (result["steps"], result["samples"]) == (12, 24)
    assert student_sha256(out) == student_sha256(run)
    assert without_time(metrics(out)) == without_time(metrics(run))


@pytest.mark.slow
def test_a_run_with_muon_resumes_to_bit_identical_weights(data, cache, tmp_path, monkeypatch):
    train(data, cache, tmp_path / "whole", optimizer="muon")
    with monkeypatch.context() as patch:
        sigterm_at(5, patch)
        with pytest.raises(Interrupted):
            train(data, cache, tmp_path / "out", optimizer="muon")
    train(data, cache, tmp_path / "out", optimizer="muon", resume=True)
    assert student_sha256(tmp_path / "out") == student_sha256(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_stopped_twice_resumes_twice(run, data, cache, tmp_path, monkeypatch):
    out = tmp_path / "out"
    for step, resume in ((2, False), (7, True)):
        with monkeypatch.context() as patch:
            sigterm_at(step, patch)
            with pytest.raises(Interrupted):
                train(data, cache, out, resume=resume)
    train(data, cache, out, resume=True)
    assert student_sha256(out) == student_sha256(run)


@pytest.mark.processes
def test_a_killed_process_resumes_to_bit_identical_weights(run, data, cache, tmp_path, door):
    out = tmp_path / "out"
    arguments = ["distill", "--student", STUDENT, "--cache", cache, "--data", data, "--images", IMAGES, "--out", out]
    arguments += ["--epochs", 4, "--batch-size", 2, "--learning-rate", "1e-3", "--log-steps", 1, "--save-steps", 1]
    arguments += ["--device", "cpu", "--workers", 0]
    running = door.start(*arguments)
    wait_until(lambda: list(out.glob(f"checkpoints/checkpoint-*/{RECORD}")))
    os.kill(running.pid, signal.SIGKILL)
    assert running.finish().code == -signal.SIGKILL
    assert 1 <= metrics(out)[-1]["step"] < 12
    resumed = door(*arguments, "--resume")
    assert resumed.code == 0, resumed.stderr
    assert student_sha256(out) == student_sha256(run)
    assert [line["step"] for line in metrics(out)] == list(range(1, 13))


@pytest.mark.slow
@pytest.mark.processes
def test_twenty_random_kills_lose_no_step_and_change_no_bit(run, data, cache, tmp_path, door):
    """Whatever the run is doing: loading, learning, writing a checkpoint or removing one."""
    random = Random(0)
    kills = runs = 0
    while kills < 20:
        out = tmp_path / str(runs)
        arguments = ["distill", "--student", STUDENT, "--cache", cache, "--data", data, "--images", IMAGES, "--out", out]
        arguments += ["--epochs", 4, "--batch-size", 2, "--learning-rate", "1e-3", "--log-steps", 1, "--save-steps", 1]
        arguments += ["--device", "cpu", "--workers", 0, "--resume"]
        finished = False
        while not finished:
            running = door.start(*arguments)
            if kills < 20:
                time.sleep(random.uniform(0.5, 3.0))
                with suppress(ProcessLookupError):
                    os.kill(running.pid, signal.SIGKILL)
            ended = running.finish()
            assert ended.code in (0, -signal.SIGKILL), ended.stderr
            finished, kills = ended.code == 0, kills + (ended.code != 0)
        assert student_sha256(out) == student_sha256(run)
        assert without_time(metrics(out)) == without_time(metrics(run))
        runs += 1


@pytest.mark.parametrize("damage", ["a file is missing", "a file is shorter", "the record is cut", "no record"])
def test_only_a_whole_checkpoint_is_picked_up(tmp_path, damage):
    for step in (2, 10):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "global_step").mkdir(parents=True)
        for name in ("model.safetensors", "global_step/rank_1.pt"):
            (folder / name).write_bytes(b"weights")
        mark_complete(folder, {"step": step})
    assert find_latest(tmp_path) == (tmp_path / "checkpoint-10", {"step": 10})
    last = tmp_path / "checkpoint-10"
    if damage == "a file is missing":
        (last / "global_step/rank_1.pt").unlink()
    elif damage == "a file is shorter":
        (last / "model.safetensors").write_bytes(b"weigh")
    elif damage == "the record is cut":
        (last / RECORD).write_bytes((last / RECORD).read_bytes()[:-5])
    else:
        (last / RECORD).unlink()
    assert find_latest(tmp_path) == (tmp_path / "checkpoint-2", {"step": 2})
    remove_incomplete(tmp_path)  # else it would be counted as one of those to keep
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


@pytest.mark.slow
def test_a_checkpoint_that_was_cut_short_is_passed_over(run, data, cache, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        sigterm_at(4, patch)
        with pytest.raises(Interrupted):
            train(data, cache, out, save_steps=2)
    (out / "checkpoints" / "checkpoint-4" / RECORD).unlink()
    (out / "checkpoints" / "checkpoint-4" / "optimizer.pt").write_bytes(b"half")
    train(data, cache, out, save_steps=2, resume=True)
    assert student_sha256(out) == student_sha256(run)
    assert [line["step"] for line in metrics(out)] == list(range(1, 13))


def test_resume_without_a_checkpoint_begins_again(run, data, cache, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    first = (run / "metrics.jsonl").read_text().splitlines()[0]
    (out / "metrics.jsonl").write_text(first + "\n" + first[:40])
    shutil.copy(run / "run.json", out)
    train(data, cache, out, resume=True)
    assert student_sha256(out) == student_sha256(run)
    assert without_time(metrics(out)) == without_time(metrics(run))


@pytest.fixture
def start_method(request):
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize(
    ("start_method", "place", "workers"),
    [("fork", "local", 2), *(pytest.param(start, "s3", n, marks=pytest.mark.slow) for start, n in (("fork", 2), ("spawn", 1)))],
    indirect=["start_method"],
)
def test_loader_processes_change_nothing(run, data, cache, tmp_path, request, start_method, place, workers):
    if place == "s3":
        cache = convert(cache, request.getfixturevalue("s3_url")).url
    train(data, cache, tmp_path / "out", workers=workers)
    assert without_time(metrics(tmp_path / "out")) == without_time(metrics(run))
    assert student_sha256(tmp_path / "out") == student_sha256(run)


@pytest.mark.slow
@pytest.mark.processes
def test_a_signal_to_every_process_of_a_job_still_writes_a_checkpoint(data, cache, tmp_path, door):
    """SLURM signals loader processes too: one that died of it would take the run down."""
    out = tmp_path / "out"
    arguments = ["distill", "--student", STUDENT, "--cache", cache, "--data", data, "--images", IMAGES, "--out", out]
    arguments += ["--max-steps", 30, "--batch-size", 2, "--log-steps", 1, "--device", "cpu", "--workers", 2, "--json"]
    running = door.start(*arguments)
    wait_until(lambda: (out / "metrics.jsonl").exists() and metrics(out))
    os.killpg(running.pid, signal.SIGTERM)
    stopped = running.finish()
    assert stopped.code == 75, stopped.stderr
    assert "stopped by SIGTERM at step" in stopped.stderr
    assert "continue with --resume" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert 1 <= metrics(out)[-1]["step"] < 30
    resumed = door(*arguments, "--resume")
    assert json.loads(resumed.stdout)["steps"] == 30
    assert [line["step"] for line in metrics(out)] == list(range(1, 31))
