"""What can be retried is retried and ends with exit code 75; what the user has to change is not, and ends with 2."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import subprocess
import sys

import pytest

from alignkd.cache_store.errors import StorageError
from alignkd.errors import ConfigError, TransientError, is_resumable, is_transient
from alignkd.pipeline.runtime.out_of_memory import out_of_memory_is_transient
from alignkd.pipeline.runtime.retries import ATTEMPTS, with_retries
from alignkd.pipeline.runtime.signals import Interrupted, stop_on_signals, take_back_signals


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number), "file")


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.ECONNRESET, errno.EMFILE])
def test_faults_of_the_surroundings_are_transient(number: int) -> None:
    assert is_transient(os_error(number))
    assert is_resumable(os_error(number))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_is_resumable_but_not_tried_again_at_once(number: int) -> None:
    assert is_resumable(os_error(number))
    assert not is_transient(os_error(number))


@pytest.mark.parametrize("error", [os_error(errno.ENOENT), os_error(errno.EACCES), ConfigError("no"), ValueError("no")])
def test_what_the_user_has_to_change_is_neither(error: Exception) -> None:
    assert not is_resumable(error)


def test_storage_that_does_not_answer_is_transient() -> None:
    assert is_transient(StorageError("s3://bucket/key: no answer"))


def test_a_transient_fault_is_tried_again_with_growing_pauses() -> None:
    pauses: list[float] = []
    faults = [os_error(errno.ESTALE), os_error(errno.EIO)]

    def call() -> str:
        if faults:
            raise faults.pop()
        return "done"

    assert with_retries(call, "reading a file", sleep=pauses.append) == "done"
    assert len(pauses) == 2
    assert pauses[1] > pauses[0]


def test_the_last_attempt_names_the_cause() -> None:
    calls = []

    def call() -> None:
        calls.append(1)
        raise os_error(errno.ESTALE)

    with pytest.raises(TransientError, match=r"reading a file failed 5 times.*Stale.*run the same command again"):
        with_retries(call, "reading a file", sleep=lambda _: None)
    assert len(calls) == ATTEMPTS


def test_what_is_not_transient_is_tried_once() -> None:
    calls = []

    def call() -> None:
        calls.append(1)
        raise os_error(errno.ENOENT)

    with pytest.raises(FileNotFoundError):
        with_retries(call, "reading a file", sleep=lambda _: None)
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP"])
def test_a_signal_while_a_command_loads_its_libraries_ends_it_with_75(name: str) -> None:
    program = (
        "import os, signal\n"
        "from alignkd.pipeline.runtime.signals import resumable_from_the_start\n"
        "with resumable_from_the_start():\n"
        f"    try: os.kill(os.getpid(), signal.{name}); signal.pause()\n"
        "    except BaseException: pass\n"  # as libraries do while they are imported
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (75, f"stopped by {name}; run the same command again\n")


def test_handlers_that_a_library_replaced_below_python_are_taken_back() -> None:
    with stop_on_signals() as stop:
        ctypes.CDLL(None).signal(signal.SIGUSR1, 1)  # SIG_IGN, which Python does not see
        os.kill(os.getpid(), signal.SIGUSR1)
        assert not stop
        take_back_signals()
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(Interrupted, match="stopped by SIGUSR1"):
            stop.check()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")])
def test_memory_that_runs_out_where_no_sample_is_at_fault_is_transient(error: Exception) -> None:
    with pytest.raises(TransientError, match=r"memory ran out.*run the same command again"), out_of_memory_is_transient():
        raise error


def test_any_other_error_is_not_taken_for_lack_of_memory() -> None:
    with pytest.raises(KeyError), out_of_memory_is_transient():
        raise KeyError("a bug")
