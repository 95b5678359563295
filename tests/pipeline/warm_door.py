"""Runs the installed entry point, each time in a new process, forked from one that has done the slow imports.

Importing torch and transformers takes seconds of CPU time, and the tests of the command line start dozens of processes.
What runs is the real script, with real arguments, output, signals and exit codes.

Line by line on standard input: ``{"arguments", "stdout", "stderr"}``; answers ``{"pid"}`` at once and ``{"code"}`` at the end.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

DOOR = Path(sys.executable).parent / "alignkd"


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str


class WarmDoor:
    """The client's side: start a command, or run it to its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )

    def start(self, *arguments: object) -> int:
        """Start a command; its process id."""
        request = {"arguments": [str(a) for a in arguments], **{n: str(self.folder / n) for n in ("stdout", "stderr")}}
        print(json.dumps(request), file=self.server.stdin, flush=True)
        return json.loads(self.server.stdout.readline())["pid"]

    def finish(self) -> Finished:
        """Wait for the command that was started."""
        code = json.loads(self.server.stdout.readline())["code"]
        return Finished(code, (self.folder / "stdout").read_text(), (self.folder / "stderr").read_text())

    def __call__(self, *arguments: object) -> Finished:
        self.start(*arguments)
        return self.finish()

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait(timeout=30)


def serve() -> None:
    import alignkd.pipeline.cache_teacher
    import alignkd.pipeline.distill
    import alignkd.pipeline.evaluate
    import alignkd.pipeline.show  # noqa: F401

    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            for number, name in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
                flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
                os.dup2(os.open(name, flags, 0o600), number)
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
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    serve()
