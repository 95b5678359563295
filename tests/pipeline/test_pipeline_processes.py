"""Stage two on two processes: they learn what one with twice the batch learns, stop together, and resume."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
import torch
from jobs import distill_arguments, launched, run_job
from safetensors.torch import load_file
from tiny_runs import IMAGES, metrics, student_sha256, train, wait_until

from alignkd.pipeline.training.checkpoints import RECORD

pytestmark = pytest.mark.processes

# DeepSpeed takes long to start.
ZERO1, ZERO2, ZERO3 = (pytest.param(name, marks=pytest.mark.slow) for name in ("zero1", "zero2", "zero3"))
TERMS = ("loss", "supervised", "reverse_kl", "attention", "vision_all", "vision_focus")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data, cache):
    """One process with twice the batch: three epochs of two steps, of four samples and of two."""
    out = tmp_path_factory.mktemp("alone") / "out"
    train(data, cache, out, epochs=3.0, batch_size=4, projector_learning_rate=3e-3)
    return out


def assert_same_curve(found, expected):
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for line, wanted in zip(found, expected, strict=True):
        for name in TERMS:
            assert line[name] == pytest.approx(wanted[name], rel=2e-4, abs=1e-6), (line["step"], name)
        for name in ("samples", "tokens", "epoch"):
            assert line[name] == wanted[name], (line["step"], name)


def assert_same_student(found, expected):
    weights, wanted = (load_file(out / "student" / "model.safetensors") for out in (found, expected))
    assert weights.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("sharding", ["ddp", ZERO1, ZERO2, ZERO3], indirect=True)
def test_two_processes_learn_what_one_with_twice_the_batch_learns(door, monkeypatch, data, cache, alone, tmp_path, sharding):
    """In the last step of an epoch one of the two has no sample left."""
    out = tmp_path / "out"
    first, second = run_job(door, monkeypatch, *distill_arguments(data, cache, out, *sharding))
    assert first.code == 0, first.stderr
    assert second.code == 0, second.stderr
    assert json.loads(first.stdout)["processes"] == 2
    assert second.stdout == ""
    # Padding is the micro-batch's own.
    expected = [{**line, "tokens": 0} for line in metrics(alone)]
    assert_same_curve([{**line, "tokens": 0} for line in metrics(out)], expected)
    assert_same_student(out, alone)


@pytest.mark.parametrize("sharding", ["ddp", ZERO2, ZERO3], indirect=True)
def test_half_precision_stays_near_single(door, monkeypatch, data, cache, alone, tmp_path, sharding):
    """DeepSpeed casts weights, and would cast rotary positions, too."""
    out = tmp_path / "out"
    arguments = distill_arguments(data, cache, out, *sharding, "--dtype", "bfloat16")
    finished = run_job(door, monkeypatch, *arguments)
    assert [one.code for one in finished] == [0, 0], finished[0].stderr
    for line, wanted in zip(metrics(out), metrics(alone), strict=True):
        for name in TERMS:
            assert line[name] == pytest.approx(wanted[name], rel=0.03), (line["step"], name)


def test_accumulated_batches_learn_what_one_large_batch_learns(data, cache, alone, tmp_path):
    train(data, cache, tmp_path / "out", epochs=3.0, batch_size=1, gradient_accumulation=4, projector_learning_rate=3e-3)
    expected = [{**line, "tokens": 0} for line in metrics(alone)]
    assert_same_curve([{**line, "tokens": 0} for line in metrics(tmp_path / "out")], expected)
    assert_same_student(tmp_path / "out", alone)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "zero2", "zero3"], indirect=True)
def test_two_killed_processes_resume_to_the_same_student(door, monkeypatch, data, cache, tmp_path, sharding):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run_job(door, monkeypatch, *distill_arguments(data, cache, whole, *sharding))[0].code == 0
    arguments = distill_arguments(data, cache, out, *sharding, "--save-steps", 1)
    with launched(door, monkeypatch, *arguments) as running:
        wait_until(lambda: list(out.glob(f"checkpoints/checkpoint-*/{RECORD}")), seconds=120)
        for one in running:
            os.kill(one.pid, signal.SIGKILL)
        assert {one.finish().code for one in running} == {-signal.SIGKILL}
    assert 1 <= metrics(out)[-1]["step"] < 6
    resumed = run_job(door, monkeypatch, *arguments, "--resume")
    assert resumed[0].code == 0, resumed[0].stderr
    assert [line["step"] for line in metrics(out)] == list(range(1, 7))
    assert student_sha256(out) == student_sha256(whole)


@pytest.mark.slow
def test_a_run_of_two_processes_resumes_on_one(door, monkeypatch, data, cache, alone, tmp_path):
    out = tmp_path / "out"
    with launched(door, monkeypatch, *distill_arguments(data, cache, out, "--save-steps", 1)) as running:
        wait_until(lambda: list(out.glob(f"checkpoints/checkpoint-*/{RECORD}")), seconds=120)
        os.kill(running[1].pid, signal.SIGTERM)  # one of them is told, and both stop
        stopped = [one.finish() for one in running]
    assert [one.code for one in stopped] == [75, 75], stopped[0].stderr
    step = metrics(out)[-1]["step"]
    assert 1 <= step < 6
    train(data, cache, out, epochs=3.0, batch_size=4, projector_learning_rate=3e-3, resume=True)
    expected = [{**line, "tokens": 0} for line in metrics(alone)]
    assert_same_curve([{**line, "tokens": 0} for line in metrics(out)], expected)
    assert_same_student(out, alone)


@pytest.mark.slow
def test_a_run_of_one_process_resumes_on_two(door, monkeypatch, data, cache, alone, tmp_path):
    out = tmp_path / "out"
    arguments = distill_arguments(data, cache, out, "--save-steps", 1)
    running = door.start(*arguments, "--gradient-accumulation", 2)
    wait_until(lambda: list(out.glob(f"checkpoints/checkpoint-*/{RECORD}")), seconds=120)
    os.kill(running.pid, signal.SIGTERM)
    assert running.finish().code == 75
    assert 1 <= metrics(out)[-1]["step"] < 6
    resumed = run_job(door, monkeypatch, *arguments, "--resume")
    assert [one.code for one in resumed] == [0, 0], resumed[0].stderr
    assert [line["step"] for line in metrics(out)] == list(range(1, 7))
    assert_same_student(out, alone)


@pytest.mark.slow
def test_an_error_of_one_process_ends_the_others(door, monkeypatch, data, cache, tmp_path):
    """The second one is killed: the first must neither wait for it nor end well."""
    arguments = distill_arguments(data, cache, tmp_path / "out", "--epochs", 5000)
    with launched(door, monkeypatch, *arguments) as running:
        wait_until(lambda: (tmp_path / "out" / "metrics.jsonl").exists() and metrics(tmp_path / "out"), seconds=120)
        os.kill(running[1].pid, signal.SIGKILL)
        first = running[0].finish()
        running[1].finish()
    assert first.code == 75, first.stderr
    assert "another process of this run has ended" in first.stderr
    assert "Traceback" not in first.stderr


@pytest.mark.slow
def test_a_stopped_process_is_not_awaited_for_ever(door, monkeypatch, data, cache, tmp_path):
    arguments = distill_arguments(data, cache, tmp_path / "out", "--epochs", 5000, "--max-wait", 5)
    with launched(door, monkeypatch, *arguments) as running:
        wait_until(lambda: (tmp_path / "out" / "metrics.jsonl").exists() and metrics(tmp_path / "out"), seconds=120)
        os.kill(running[1].pid, signal.SIGSTOP)
        first = running[0].finish()
        os.kill(running[1].pid, signal.SIGKILL)
        running[1].finish()
    assert first.code == 75, first.stderr
    assert "does not answer" in first.stderr


def test_another_number_of_samples_a_step_is_no_resumption(data, cache, tmp_path, alone):
    with pytest.raises(ValueError, match=r"step: .*samples.*4.* before, .*2.* now"):
        train(data, cache, alone, epochs=3.0, batch_size=2, projector_learning_rate=3e-3, resume=True)


@pytest.mark.slow
def test_deepspeed_states_ask_for_as_many_processes_as_wrote_them(door, monkeypatch, data, cache, tmp_path):
    out = tmp_path / "out"
    arguments = distill_arguments(data, cache, out, "--deepspeed", "zero2", "--save-steps", 1)
    assert run_job(door, monkeypatch, *arguments)[0].code == 0
    more = ["--gradient-accumulation", 2, "--resume"]
    (refused,) = run_job(door, monkeypatch, *arguments, *more, processes=1)
    assert refused.code == 2
    assert "written by 2 processes" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("sharding", ["ddp", ZERO3], indirect=True)
def test_samples_without_images_stall_no_process(door, monkeypatch, data, cache, tmp_path, sharding):
    """One process sees an image and the other none: both must meet in every layer."""
    chosen = tmp_path / "chosen.json"
    samples = json.loads(data.read_text())
    chosen.write_text(json.dumps([s for s in samples if not s.get("image")] + [s for s in samples if s.get("image")][:1]))
    arguments = distill_arguments(chosen, None, tmp_path / "out", "--recipe", "sft", "--max-length", 512, *sharding)
    finished = run_job(door, monkeypatch, *arguments[:-2], *arguments[-2:], "--batch-size", 1)
    assert [one.code for one in finished] == [0, 0], finished[0].stderr


@pytest.mark.slow
def test_a_sample_that_one_process_rejects_is_counted_by_all_of_them(door, data, cache, tmp_path, monkeypatch):
    images = tmp_path / "images"
    shutil.copytree(IMAGES, images)
    (images / "1.png").unlink()
    arguments = distill_arguments(data, cache, tmp_path / "out")
    arguments[arguments.index("--images") + 1] = images
    ended = run_job(door, monkeypatch, *arguments, "--json")
    assert [one.code for one in ended] == [0, 0], ended[0].stderr
    figures = json.loads((tmp_path / "out" / "result.json").read_text())
    # It comes in each of three epochs, whichever process has it then.
    assert (figures["rejected"], list(figures["rejected_samples"])) == (1, ["vqa1"])
    (images / "0.png").unlink()
    arguments[arguments.index("--out") + 1] = tmp_path / "other"
    stopped = run_job(door, monkeypatch, *arguments, "--max-rejected", 1)
    assert [one.code for one in stopped] == [2, 2], stopped[0].stderr
    assert all("2 samples cannot be used, more than --max-rejected 1 allows: 2 image missing" in one.stderr for one in stopped)
