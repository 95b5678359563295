"""Loader processes that fail, are killed, stopped or orphaned: the run ends with what happened, and nothing waits for ever."""

from __future__ import annotations

import errno
import multiprocessing
import os
import queue
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import psutil
import pytest
from tiny_runs import IMAGES, STUDENT, train, wait_until
from warm_door import DOOR

from alignkd.errors import CacheError, TransientError
from alignkd.pipeline.feeding import loader_processes
from alignkd.pipeline.feeding.dataset import TrainingSet
from alignkd.pipeline.feeding.loader_processes import LoaderFailure, lost_loader, receive_ahead
from alignkd.pipeline.training.callbacks import RunCallback

pytestmark = pytest.mark.processes

GENEROUS_S = 120
"""Far more than any of these takes; what they guard against never ended."""


def at_step(step, monkeypatch, act):
    """Act on the loader processes when a step is done."""
    real = RunCallback.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            act(multiprocessing.active_children())
        return real(self, args, state, control, **kwargs)

    monkeypatch.setattr(RunCallback, "on_step_end", on_step_end)


def damaged(cache: Path, folder: Path) -> Path:
    """A copy of a cache, a byte of each shard changed."""
    shutil.copytree(cache, folder)
    for shard in (folder / "shards").iterdir():
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    return folder


def test_an_error_in_a_run_with_loaders_leaves_none_of_them(data, cache, tmp_path):
    with pytest.raises(CacheError, match=r"shard \d of the cache .* cannot be used"):
        train(data, damaged(cache, tmp_path / "cache"), tmp_path / "out", workers=2)
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_an_error_with_loaders_ends_the_real_program_with_its_exit_code(data, cache, tmp_path):
    folder = damaged(cache, tmp_path / "cache")
    arguments = ["--student", STUDENT, "--cache", folder, "--data", data, "--images", IMAGES, "--out", tmp_path / "out"]
    command = [DOOR, "distill", *map(str, arguments), "--workers", "2", "--device", "cpu", "--batch-size", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=GENEROUS_S, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("which", [0, 1])
def test_a_killed_loader_ends_the_run_as_something_to_try_again(data, cache, tmp_path, monkeypatch, which):
    at_step(2, monkeypatch, lambda loaders: loaders[which].kill())
    with pytest.raises(TransientError, match=r"loader process .*([Kk]ill|exited).*--resume"):
        train(data, cache, tmp_path / "out", workers=2, epochs=200.0)
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_stopped_loaders_end_the_run_when_the_longest_wait_is_over(data, cache, tmp_path, monkeypatch):
    at_step(2, monkeypatch, lambda loaders: [os.kill(one.pid, signal.SIGSTOP) for one in loaders])
    with pytest.raises(TransientError, match=r"gave no batch in 1 seconds.*--resume"):
        train(data, cache, tmp_path / "out", workers=2, epochs=200.0, max_wait=1.0)
    assert multiprocessing.active_children() == []


def test_an_error_of_the_file_system_in_a_loader_keeps_its_number(data, cache, tmp_path, monkeypatch):
    def stale(self, positions):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "image.png")

    monkeypatch.setattr(TrainingSet, "__getitems__", stale)
    with pytest.raises(OSError, match=r"image\.png") as caught:
        train(data, cache, tmp_path / "out", workers=1)
    assert caught.value.errno == errno.ESTALE


def test_loaders_end_when_the_training_process_is_killed(data, cache, tmp_path, door):
    out = tmp_path / "out"
    arguments = ["distill", "--student", STUDENT, "--cache", cache, "--data", data, "--images", IMAGES, "--out", out]
    arguments += ["--workers", 2, "--device", "cpu", "--batch-size", 2, "--epochs", 5000, "--log-steps", 1]
    running = door.start(*arguments)
    wait_until(lambda: (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text(), seconds=GENEROUS_S)
    loaders = psutil.Process(running.pid).children()
    assert len(loaders) == 2
    os.kill(running.pid, signal.SIGKILL)
    running.finish()
    wait_until(lambda: not any(one.is_running() and one.status() != "zombie" for one in loaders), seconds=GENEROUS_S)


class PartOfABatch:
    """A loader was killed while it wrote: whoever reads waits for a rest that never comes."""

    def __init__(self, exit_code):
        self._workers = [type("Dead", (), {"exitcode": exit_code, "pid": 7, "kill": int, "join": int, "is_alive": int})]
        self._workers[0].join = staticmethod(lambda _: None)
        self._workers[0].is_alive = staticmethod(lambda: False)
        self._workers[0].kill = staticmethod(lambda: None)

    def __next__(self):
        threading.Event().wait()


def test_a_batch_of_which_only_a_part_came_is_not_awaited(monkeypatch):
    monkeypatch.setattr(loader_processes, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(loader_processes.signal_handling, "_remove_worker_pids", lambda _: None)
    with pytest.raises(TransientError, match="loader process 7 was killed by SIGKILL"):
        next(receive_ahead(PartOfABatch(-9), longest_wait_s=1e9))


def test_an_error_that_cannot_be_sent_arrives_by_its_text():
    class LocalError(ValueError):
        pass

    found = LoaderFailure(LocalError("of this test alone")).error
    assert str(found) == "LocalError in a loader process: of this test alone"


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), ValueError("DataLoader worker (pid 3)"), queue.Empty()])
def test_other_errors_are_no_lost_loaders(error):
    assert lost_loader(error) is None
