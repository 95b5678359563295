"""A disk that is full, forbidden or gone while a run writes: one message, the right exit code, and what was kept stays."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess

import pytest
from safetensors import SafetensorError
from tiny_runs import IMAGES, STUDENT, student_sha256, train, wait_until

from alignkd.errors import CheckpointError, TransientError, is_resumable
from alignkd.pipeline.runtime.out_folder.write_faults import explained_write_faults
from alignkd.pipeline.training.checkpoints import find_latest, mark_complete
from alignkd.pipeline.training.trainer import DistillTrainer

FAULTS = [OSError(number, os.strerror(number)) for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)]
FAULTS += [SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")]
FAULTS += [RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")]
FAULTS += [RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_every_librarys_fault_is_one_message_to_try_again(tmp_path, fault):
    with (
        pytest.raises(TransientError, match=r"checkpoint-4 cannot be written to .*Step 2 is kept\. .*--resume") as caught,
        explained_write_faults(tmp_path, "checkpoint-4", lambda: "Step 2 is kept."),
    ):
        raise fault
    assert is_resumable(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", [FileNotFoundError(errno.ENOENT, "x"), RuntimeError("Parent directory /x does not exist.")])
def test_a_folder_that_is_gone_is_the_users(tmp_path, fault):
    with pytest.raises(CheckpointError, match="was removed while the run"), explained_write_faults(tmp_path, "a log line"):
        raise fault


@pytest.mark.parametrize("fault", [RuntimeError("CUDA error"), ValueError("no"), CheckpointError("no")])
def test_other_errors_pass(tmp_path, fault):
    with pytest.raises(type(fault), match=str(fault)), explained_write_faults(tmp_path, "a log line"):
        raise fault


def fail_at(step, monkeypatch, name, fault):
    """Have one of the writers of a checkpoint fail, after it has written a part."""
    real = getattr(DistillTrainer, name)

    def fails(self, folder, *arguments, **keywords):
        real(self, folder, *arguments, **keywords)
        if self.state.global_step == step:
            raise fault

    monkeypatch.setattr(DistillTrainer, name, fails)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["_save", "_save_optimizer_and_scheduler", "_save_rng_state"])
def test_a_disk_that_fills_while_saving_keeps_the_checkpoint_before_and_leaves_no_part(
    run, data, cache, tmp_path, monkeypatch, name
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        fail_at(6, patch, name, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        with pytest.raises(TransientError, match=r"checkpoint-6 .*No space.*up to step 4 is kept in .*checkpoint-4.*--resume"):
            train(data, cache, out, save_steps=2)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    train(data, cache, out, save_steps=2, resume=True)
    assert student_sha256(out) == student_sha256(run)


def test_a_seal_that_cannot_be_written_is_no_checkpoint(data, cache, tmp_path, monkeypatch):
    def full(folder, state):
        mark_complete(folder, state)
        (folder / "complete.json").unlink()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("alignkd.pipeline.training.trainer.mark_complete", full)
        with pytest.raises(TransientError, match=r"No space left on device"):
            train(data, cache, out, save_steps=2)
    assert find_latest(out / "checkpoints") is None
    assert list((out / "checkpoints").iterdir()) == []


@pytest.mark.processes
def test_a_folder_removed_while_training_is_one_message(data, cache, tmp_path, door):
    out = tmp_path / "out"
    arguments = ["distill", "--student", STUDENT, "--cache", cache, "--data", data, "--images", IMAGES, "--out", out]
    arguments += ["--device", "cpu", "--batch-size", 2, "--log-steps", 1, "--workers", 0, "--epochs", 5000]
    running = door.start(*arguments)
    wait_until(lambda: (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text(), seconds=120)
    out.rename(tmp_path / "moved")
    ended = running.finish()
    assert ended.code == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "was removed while the run was writing there" in ended.stderr


def mounted(folder, size):
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, check=False)
    return done.returncode == 0


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("size", ["600k", "1500k", "2m"])
def test_a_really_full_disk_is_one_message_and_exit_code_75(data, cache, tmp_path, door, size):
    if not shutil.which("mount") or os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    if not mounted(disk, size):
        pytest.skip("this system mounts no tmpfs here")
    try:
        arguments = ["--student", STUDENT, "--cache", cache, "--data", data, "--images", IMAGES, "--out", disk / "out"]
        arguments += ["--device", "cpu", "--batch-size", 2, "--save-steps", 1, "--max-steps", 12, "--workers", 0]
        ended = door("distill", *arguments)
        assert ended.code == 75, ended.stderr
        assert "Traceback" not in ended.stderr
        assert "No space left on device" in ended.stderr
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        again = door("distill", *arguments, "--resume")
        assert again.code == 0, again.stderr
    finally:
        subprocess.run(["umount", disk], check=False)
