"""Faults inside a process: what the operating system answers, and what the clock says.

A command is started by :class:`StormDoor`, a :class:`warm_door.WarmDoor` whose processes first install the fault that
the variable ``STORM_FAULT`` names: ``{"kind", "after", "times"}``. The ``after``-th matching call fails, and the
``times - 1`` after it (-1: all after it).
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "pipeline"))

import warm_door

VARIABLE = "STORM_FAULT"
CLOCK_STEPS_S = (-86_400.0, -3_600.0, 3_600.0, 86_400.0)


class StormDoor(warm_door.WarmDoor):
    """Starts the installed entry point with faults of the process's own."""

    server_script = __file__

    def start_with(self, fault: dict[str, Any] | None, *arguments: object) -> warm_door.Running:
        """Start a command; ``fault``: see :func:`install`."""
        os.environ[VARIABLE] = json.dumps(fault)
        try:
            return self.start(*arguments)
        finally:
            del os.environ[VARIABLE]


class Counter:
    """Says which of the matching calls fail."""

    def __init__(self, after: int, times: int) -> None:
        self.after, self.times, self.calls = after, times, 0

    def fails(self) -> bool:
        """Count a call."""
        self.calls += 1
        return self.calls >= self.after and (self.times < 0 or self.calls < self.after + self.times)


def install(fault: dict[str, Any]) -> None:
    """Break this process.

    ``ENOSPC write``, ``EIO write``: of ``os.fsync``, which ends every file that must last. ``ESTALE read``, ``EIO read``: of
    opening an image. ``clock``: ``time.time`` makes a step of ``seconds`` at its ``after``-th call.
    """
    kind, counter = fault["kind"], Counter(fault["after"], fault.get("times", -1))
    if kind == "clock":
        _move_clock(counter, fault["seconds"])
        return
    name, action = kind.split()
    number = getattr(errno, name)

    def refuse(path: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    if action == "write":
        os.fsync = _failing(os.fsync, counter, lambda *_: True, refuse)
    else:
        for module, function in ((builtins, "open"), (io, "open"), (os, "open")):
            setattr(module, function, _failing(getattr(module, function), counter, _is_image, refuse))


def _failing(
    real: Callable[..., Any], counter: Counter, matches: Callable[..., bool], refuse: Callable[[object], None]
) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        if matches(*arguments) and counter.fails():
            refuse(arguments[0])
        return real(*arguments, **named)

    return call


def _is_image(path: object, *_: object) -> bool:
    return str(path).endswith(".png")


def _move_clock(counter: Counter, seconds: float) -> None:
    real = time.time
    time.time = lambda: real() + (seconds if counter.fails() else 0.0)


def _run(request: dict[str, Any]) -> None:
    fault = json.loads(request["environment"].pop(VARIABLE, "null"))
    if fault is not None:
        install(fault)
    warm_door.run(request)


if __name__ == "__main__":
    warm_door.serve(_run)
