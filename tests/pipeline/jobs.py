"""Jobs of several processes, as torchrun starts them, and the arguments of one for stage two."""

from __future__ import annotations

import socket
from contextlib import contextmanager

from tiny_runs import IMAGES, STUDENT


@contextmanager
def launched(door, monkeypatch, *arguments, processes=2):
    """The processes of one job, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with monkeypatch.context() as patch:
        for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port), ("WORLD_SIZE", processes)):
            patch.setenv(name, str(value))
        running = []
        for rank in range(processes):
            patch.setenv("RANK", str(rank))
            patch.setenv("LOCAL_RANK", str(rank))
            running.append(door.start(*arguments))
    yield running


def run_job(door, monkeypatch, *arguments, processes=2):
    with launched(door, monkeypatch, *arguments, processes=processes) as running:
        return [one.finish() for one in running]


def distill_arguments(data, cache, out, *more):
    arguments = ["distill", "--student", STUDENT, "--data", data, "--images", IMAGES, "--out", out, "--device", "cpu"]
    arguments += ["--cache", cache] if cache else []
    arguments += [
        "--epochs",
        3,
        "--batch-size",
        2,
        "--learning-rate",
        "1e-3",
        "--projector-learning-rate",
        "3e-3",
        "--log-steps",
        1,
        "--workers",
        0,
        "--json",
    ]
    return [*arguments, *more]
