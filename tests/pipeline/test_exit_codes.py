"""What can be retried is retried and ends with exit code 75; what the user has to change is not, and ends with 2."""

from __future__ import annotations

import errno
import os

import pytest

from alignkd.cache_store.errors import StorageError
from alignkd.errors import ConfigError, TransientError, is_resumable, is_transient
from alignkd.pipeline.runtime.retries import ATTEMPTS, with_retries


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

    with pytest.raises(TransientError, match=r"reading a file failed 5 times.*Stale"):
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
