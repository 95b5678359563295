"""Runs the installed entry point, each time in a new process, forked from one that has done the slow imports.

Importing torch and transformers takes seconds of CPU time, and the tests of the command line start dozens of processes.
What runs is the real script, with real arguments, output, signals and exit codes; any number of them at once.

Line by line on standard input: ``{"arguments", "streams", "at_terminal", "environment"}`` starts a command and answers its
process id; a process id waits for that command and answers its exit code.
"""

from __future__ import annotations

import functools
import gc
import itertools
import json
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FOR_TRANSFORMERS = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""What the entry point sets before it imports transformers, which is imported here before it runs."""

DOOR = Path(sys.executable).parent / "alignkd"
_PASSED_ON = (
    "AWS_",
    "FSSPEC_",
    "NO_PROXY",
    "OMPI_",
    "PMI_",
    "SLURM_",
    "JOB_COMPLETION_INDEX",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_",
    "STORM_",
)


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Running:
    """A command that was started; its process id is its own until ``finish`` is called."""

    door: WarmDoor
    pid: int
    stdout: Path
    stderr: Path

    def finish(self) -> Finished:
        """Wait for its end."""
        code = self.door.ask(self.pid)
        self.door.unfinished.remove(self.pid)
        return Finished(code, self.stdout.read_text(), self.stderr.read_text())


class WarmDoor:
    """The client's side: start commands, or run one to its end. ``environment`` is added to that of this process."""

    server_script = __file__

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        self.numbers = itertools.count()
        self.unfinished: set[int] = set()
        self.server = subprocess.Popen(
            [sys.executable, self.server_script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **_FOR_TRANSFORMERS, **environment},
        )

    def ask(self, request: Any) -> int:
        """One line there, one number back."""
        print(json.dumps(request), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def start(self, *arguments: object, stdin: object = None, terminal: object = None, **given: str) -> Running:
        """Start a command in the launcher's and the storage's environment of this process, and what is ``given`` of it.

        ``stdin``: the file that it reads, nothing by default. ``terminal``: a device that it is at, with all of its streams; an
        interrupt typed there reaches it.
        """
        number = next(self.numbers)
        stdout, stderr = self.folder / f"{number}.stdout", self.folder / f"{number}.stderr"
        for path in (stdout, stderr):  # a command may be killed before it can
            path.touch()
        environment = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)} | given
        streams = {0: stdin or os.devnull, 1: stdout, 2: stderr} if terminal is None else dict.fromkeys(range(3), terminal)
        request = {"arguments": [str(a) for a in arguments], "streams": [str(streams[number]) for number in range(3)]}
        request["at_terminal"] = terminal is not None
        running = Running(self, self.ask({**request, "environment": environment}), stdout, stderr)
        self.unfinished.add(running.pid)
        return running

    def __call__(self, *arguments: object, **given: Any) -> Finished:
        return self.start(*arguments, **given).finish()

    def close(self) -> None:
        for pid in self.unfinished:  # of tests that failed
            os.kill(pid, signal.SIGKILL)
        self.server.stdin.close()
        self.server.wait(timeout=30)


def serve(run: Callable[[dict[str, Any]], None]) -> None:
    import alignkd.pipeline.evaluate.chat.session
    import alignkd.pipeline.evaluate.runner
    import alignkd.pipeline.evaluate.show_sample
    import alignkd.pipeline.stage_one.worker
    import alignkd.pipeline.training.run  # noqa: F401

    _read_the_description_of_s3()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        if isinstance(request, int):
            _, status = os.waitpid(request, 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if answer == 0:
                run(request)
        print(answer, flush=True)


def _read_the_description_of_s3() -> None:
    """Otherwise half of what a short command on an object store takes."""
    import s3fs  # noqa: F401
    from botocore import session

    session.create_loader = functools.cache(session.create_loader)
    session.get_session().create_client("s3", region_name="us-east-1")


def run(request: dict[str, Any]) -> None:
    """Become the command, in a process that was forked for it."""
    from fsspec.config import conf, set_conf_env

    if request["at_terminal"]:
        os.setsid()  # the terminal that the leader of a session opens first is its own
        signal.signal(signal.SIGINT, signal.default_int_handler)
    else:
        os.setpgid(0, 0)
    for number, name in enumerate(request["streams"]):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(name, flags, 0o600), number)
    # The server has read from its own, and what it knows of the others (whether they can be sought) is not true of a terminal.
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    if request["at_terminal"]:
        sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
    os.environ.update(request["environment"])
    set_conf_env(conf)
    sys.argv = [str(DOOR), *request["arguments"]]
    try:
        runpy.run_path(str(DOOR), run_name="__main__")
        code: object = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)  # tearing torch down would take most of the time


if __name__ == "__main__":
    serve(run)
