"""One folder, one run: a second one is refused by the name of the first, and a dead one stands in nobody's way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from tiny_runs import IMAGES, STUDENT, metrics, train, wait_until

from alignkd.errors import ConfigError
from alignkd.pipeline.runtime.out_folder import lock as run_lock
from alignkd.pipeline.runtime.out_folder.holder import Holder, start_of
from alignkd.pipeline.runtime.out_folder.lock import NAME, RunLock, held


def nothing() -> None:
    pass


def left_by(folder: Path, **changes: object) -> Holder:
    """A lock file that another run left."""
    folder.mkdir(exist_ok=True)
    holder = replace(Holder.here(), **changes)
    (folder / NAME).write_text(json.dumps(asdict(holder)))
    return holder


def test_a_second_run_is_refused_by_the_name_of_the_first(tmp_path):
    with held(tmp_path), pytest.raises(ConfigError) as refused, held(tmp_path):
        pass
    message = str(refused.value)
    for part in (str(os.getpid()), Holder.here().host, "started 2", f"rm {tmp_path / NAME}", Path(sys.argv[0]).name):
        assert part in message
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_nothing_was_put_into_is_removed_again(tmp_path):
    with held(tmp_path / "new" / "run"):
        assert (tmp_path / "new" / "run" / NAME).exists()
    assert not (tmp_path / "new" / "run").exists()


def test_a_dead_process_holds_nothing(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "pass"]) as ended:
        ended.wait()
    left_by(tmp_path, pid=ended.pid, process_start="12345")
    with held(tmp_path) as lock:
        assert json.loads((tmp_path / NAME).read_text())["run_id"] == lock.holder.run_id


def test_a_process_id_that_was_given_again_holds_nothing(tmp_path):
    left_by(tmp_path, pid=os.getpid(), process_start="1")
    with held(tmp_path):
        pass


@pytest.mark.processes
def test_a_killed_process_that_nobody_has_reaped_holds_nothing(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as killed:
        start = start_of(killed.pid)
        holder = left_by(tmp_path, pid=killed.pid, process_start=start)
        assert holder.is_alive()
        killed.kill()
        wait_until(lambda: not holder.is_alive())
        with held(tmp_path):
            pass


def test_a_machine_that_was_started_again_holds_nothing(tmp_path):
    if not Holder.here().machine:
        pytest.skip("this machine has no id")
    left_by(tmp_path, boot="another")
    with held(tmp_path):
        pass


@pytest.mark.parametrize("changes", [{"host": "elsewhere"}, {"pids": "pid:[1]"}], ids=["another machine", "a container"])
def test_a_run_elsewhere_that_shows_life_is_refused(tmp_path, changes):
    left_by(tmp_path, **changes)
    times = []

    def sleep(seconds):
        times.append(seconds)
        if len(times) == 3:
            os.utime(tmp_path / NAME, ns=(1, 1))

    with pytest.raises(ConfigError, match="in use by another run"):
        RunLock(tmp_path).take(nothing, sleep)
    assert len(times) == 3


def test_a_run_elsewhere_without_a_sign_of_life_is_replaced_after_the_stated_time(tmp_path):
    left_by(tmp_path, host="elsewhere")
    waited = []
    lock = RunLock(tmp_path)
    lock.take(nothing, waited.append)
    assert sum(waited) == pytest.approx(run_lock.DEAD_AFTER_S)
    lock.release()


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b'{"host": "x"}', b"\xff", b"[" * 100_000])
def test_a_damaged_lock_is_watched_like_one_from_elsewhere(tmp_path, content):
    (tmp_path / NAME).write_bytes(content)
    waited = []
    lock = RunLock(tmp_path)
    lock.take(nothing, waited.append)
    assert waited
    lock.check()
    lock.release()


def test_a_run_that_was_taken_for_dead_does_not_go_on_writing(tmp_path):
    with held(tmp_path) as first:
        first.check()
        left_by(tmp_path, host="elsewhere", command="alignkd distill --out x")
        with pytest.raises(ConfigError, match="in use by another run: alignkd distill --out x"):
            first.check()
    assert (tmp_path / NAME).exists()


def test_a_lock_that_changed_hands_while_it_was_judged_is_not_removed(tmp_path):
    left_by(tmp_path, pid=1, process_start="0")
    judged = (tmp_path / NAME).read_bytes()
    left_by(tmp_path, run_id="of another run")
    RunLock(tmp_path)._remove(judged)
    assert json.loads((tmp_path / NAME).read_text())["run_id"] == "of another run"


def test_many_at_once_are_one(tmp_path):
    left_by(tmp_path, pid=os.getpid(), process_start="1")
    taken, start, refused = [], threading.Barrier(8), []

    def take():
        lock = RunLock(tmp_path)
        start.wait()
        try:
            lock.take(nothing)
            taken.append(lock)
        except ConfigError:
            refused.append(lock)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(taken), len(refused)) == (1, 7)
    taken[0].release()


def test_the_command_is_written_without_credentials(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/alignkd", "distill", "--cache", "s3://id:secret@host/bucket"])
    assert "secret" not in Holder.here().command
    assert Holder.here().command.startswith("alignkd distill")


def arguments_of(data, cache, out):
    arguments = ["distill", "--student", STUDENT, "--cache", cache, "--data", data, "--images", IMAGES, "--out", out]
    return [*arguments, "--device", "cpu", "--batch-size", 2, "--log-steps", 1, "--workers", 0]


@pytest.mark.processes
def test_a_second_training_in_the_same_folder_ends_with_exit_code_2(data, cache, tmp_path, door):
    out = tmp_path / "out"
    arguments = arguments_of(data, cache, out)
    first = door.start(*arguments, "--epochs", 5000)
    wait_until(lambda: (out / "metrics.jsonl").exists() and metrics(out), seconds=120)
    for more in ([], ["--resume"]):
        refused = door(*arguments, *more)
        assert refused.code == 2
        assert f"process {first.pid} on" in refused.stderr
    os.kill(first.pid, signal.SIGKILL)
    first.finish()
    assert (out / NAME).exists()
    again = door(*arguments, "--epochs", 5000, "--max-steps", 2, "--resume")
    assert "in use" not in again.stderr
    assert not (out / NAME).exists()


def test_a_finished_run_leaves_no_lock(run):
    assert not (run / NAME).exists()


def test_a_refused_run_leaves_no_folder(data, tmp_path):
    with pytest.raises(ValueError, match="give --cache"):
        train(data, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
