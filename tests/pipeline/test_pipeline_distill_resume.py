"""Stage two stopped, killed and read by other processes: the same student, bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal

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

from alignkd.cache_store.convert import convert
from alignkd.pipeline.checkpoints import RECORD
from alignkd.pipeline.interrupt import Interrupted
from alignkd.pipeline.trainer import RunCallback


def sigterm_at(step, monkeypatch):
    real = RunCallback.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, args, state, control, **kwargs)

    monkeypatch.setattr(RunCallback, "on_step_end", on_step_end)


@pytest.mark.parametrize("step", [5, 6])
def test_a_run_stopped_at_any_step_resumes_to_bit_identical_weights_and_metrics(run, data, cache, tmp_path, monkeypatch, step):
    """Step 5 lies within an epoch, step 6 ends one."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        sigterm_at(step, patch)
        with pytest.raises(Interrupted, match=f"stopped by SIGTERM at step {step}; go on with --resume"):
            train(data, cache, out)
    assert [line["step"] for line in metrics(out)] == list(range(1, step + 1))
    assert not (out / "student").exists()
    result = train(data, cache, out, resume=True)
    assert (result["steps"], result["samples"]) == (12, 24)
    assert student_sha256(out) == student_sha256(run)
    assert without_time(metrics(out)) == without_time(metrics(run))


def test_a_run_with_muon_resumes_to_bit_identical_weights(data, cache, tmp_path, monkeypatch):
    train(data, cache, tmp_path / "whole", optimizer="muon")
    with monkeypatch.context() as patch:
        sigterm_at(5, patch)
        with pytest.raises(Interrupted):
            train(data, cache, tmp_path / "out", optimizer="muon")
    train(data, cache, tmp_path / "out", optimizer="muon", resume=True)
    assert student_sha256(tmp_path / "out") == student_sha256(tmp_path / "whole")


def test_a_run_stopped_twice_resumes_twice(run, data, cache, tmp_path, monkeypatch):
    out = tmp_path / "out"
    for step, resume in ((2, False), (7, True)):
        with monkeypatch.context() as patch:
            sigterm_at(step, patch)
            with pytest.raises(Interrupted):
                train(data, cache, out, resume=resume)
    train(data, cache, out, resume=True)
    assert student_sha256(out) == student_sha256(run)


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
    train(data, cache, out, resume=True)
    assert student_sha256(out) == student_sha256(run)
    assert without_time(metrics(out)) == without_time(metrics(run))


@pytest.fixture
def start_method(request):
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.parametrize(
    ("start_method", "place", "workers"),
    [("fork", "local", 2), ("fork", "s3", 2), ("spawn", "s3", 1)],
    indirect=["start_method"],
)
def test_loader_processes_change_nothing(run, data, cache, tmp_path, request, start_method, place, workers):
    if place == "s3":
        cache = convert(cache, request.getfixturevalue("s3_url")).url
    train(data, cache, tmp_path / "out", workers=workers)
    assert without_time(metrics(tmp_path / "out")) == without_time(metrics(run))
    assert student_sha256(tmp_path / "out") == student_sha256(run)


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
    assert "go on with --resume" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert 1 <= metrics(out)[-1]["step"] < 30
    resumed = door(*arguments, "--resume")
    assert json.loads(resumed.stdout)["steps"] == 30
    assert [line["step"] for line in metrics(out)] == list(range(1, 31))
