"""The rounds of a storm: what is drawn, what is started, and what must be true at the end."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from crashes import look_at
from s3_server import S3, new_bucket
from storm_faults import CLOCK_STEPS_S, StormDoor
from tiny_runs import IMAGES, STUDENT, TEACHER, metrics, student_sha256
from warm_door import Running

RESUMABLE = 75
FORMATS = ("zarr", "webdataset")
_SIGNALS = {"kill -9": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGHUP": signal.SIGHUP}


@dataclass
class Round:
    """One disturbed run and what came of it; no ``problems``: sound. ``codes``: exit codes of the disturbed processes."""

    stage: str
    place: str
    faults: list[str]
    codes: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    hangs: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        verdict = "sound" if not self.problems else f"NOT SOUND: {self.problems}"
        return (
            f"{self.stage} {self.place:<17} {' + '.join(self.faults)}: exit codes {self.codes}, {self.seconds:.1f} s: {verdict}"
        )


def ended(pid: int) -> bool:
    """Whether a process has ended (it may still be waited for)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_for(running: Running, patience: float, found: Round) -> tuple[int, str]:
    """The exit code and the messages of a process; one that outlives the patience is killed, and counted."""
    end = time.monotonic() + patience
    while not ended(running.pid):
        if time.monotonic() > end:
            found.hangs += 1
            found.problems.append(f"a process was alive after {patience} s")
            os.killpg(running.pid, signal.SIGKILL)
            break
        time.sleep(0.02)
    finished = running.finish()
    return finished.code, finished.stderr


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout
    return [int(word) for word in found.split()]


class Rounds(ABC):
    """What both stages share: draw faults, disturb, continue, audit."""

    stage: str
    kinds: tuple[str, ...]

    def __init__(self, door: StormDoor, data: Path, folder: Path, s3: S3, patience: float) -> None:
        self.door, self.data, self.folder, self.s3, self.patience = door, data, folder, s3, patience
        self.undisturbed()

    @abstractmethod
    def undisturbed(self) -> None:
        """Learn what the end of every round must be."""

    @abstractmethod
    def disturb(self, chance: random.Random, kind: str, found: Round) -> None:
        """Start the command, and let the fault meet it."""

    @abstractmethod
    def finish(self, found: Round) -> None:
        """Run the command undisturbed, and compare."""

    @abstractmethod
    def prepare(self, chance: random.Random, number: int) -> str:
        """Choose the format and the place of a round; returns them in words."""

    def run(self, chance: random.Random, number: int, only: str | None) -> Round:
        """One round with one or two faults, one after the other."""
        kinds = [kind for kind in self.kinds if kind.startswith(only or "")] or list(self.kinds)
        place = self.prepare(chance, number)
        here = [kind for kind in kinds if not kind.startswith("S3") or "s3" in place] or [self.kinds[0]]
        found = Round(self.stage, place, [chance.choice(here) for _ in range(chance.randint(1, 2))])
        started = time.perf_counter()
        for kind in found.faults:
            self.disturb(chance, kind, found)
            self.s3.reset()
        self.finish(found)
        found.seconds = round(time.perf_counter() - started, 2)
        return found

    def in_process(self, chance: random.Random, kind: str) -> dict[str, object] | None:
        """The fault that the process installs itself, if it is of that kind."""
        if kind == "clock":
            return {"kind": kind, "after": chance.randint(1, 60), "seconds": chance.choice(CLOCK_STEPS_S)}
        if kind.split()[0] in ("ENOSPC", "EIO", "ESTALE"):
            times = chance.choice([1, 2, -1])
            return {"kind": kind, "after": chance.randint(1, 12), "times": times}
        return None

    def s3_fault(self, chance: random.Random, kind: str) -> None:
        """Have the server answer badly from now on; ``S3 down`` until the round's next part."""
        name = kind.removeprefix("S3 ")
        method = chance.choice(["", "GET", "PUT", "HEAD"])
        if name == "down":
            self.s3.fail(chance.choice(["500", "503", "drop"]), times=-1)
        elif name == "slow":
            self.s3.fail("slow", method, times=chance.randint(1, 5), seconds=0.3)
        else:
            self.s3.fail(name, method, times=chance.randint(1, 3))

    def expect(self, found: Round, kind: str, code: int, words: str, *allowed: int) -> None:
        """Note an exit code that the fault does not allow, or a traceback."""
        found.codes.append(code)
        if code not in allowed or "Traceback" in words:
            found.problems.append(f"{kind}: exit code {code}, expected one of {allowed}: {words[-1500:]}")


class StageOneRounds(Rounds):
    """``alignkd cache-teacher``."""

    stage = "stage one"
    kinds = (
        *("kill -9", "SIGTERM", "SIGHUP", "ENOSPC write", "EIO write", "ESTALE read", "EIO read", "clock", "two jobs"),
        *("S3 500", "S3 503", "S3 drop", "S3 slow", "S3 down", "S3 500 after", "S3 drop after"),
    )

    def undisturbed(self) -> None:
        self.expected = {}
        for shard_format in FORMATS:
            self.cache, self.shard_format = str(self.folder / f"expected-{shard_format}"), shard_format
            started = time.perf_counter()
            finished = self.start(None).finish()
            assert finished.code == 0, finished.stderr
            self.seconds = time.perf_counter() - started
            self.expected[shard_format] = look_at(self.cache, [], [], 0).content_sha256

    def prepare(self, chance: random.Random, number: int) -> str:
        self.shard_format, place = chance.choice(FORMATS), chance.choice(["local", "s3"])
        self.cache = f"{new_bucket(self.s3)}/cache" if place == "s3" else str(self.folder / f"cache-{number}")
        return f"{place} {self.shard_format}"

    def start(self, fault: dict[str, object] | None, rank: int = 0, workers: int = 1) -> Running:
        """One worker."""
        given = {"--teacher": TEACHER, "--data": self.data, "--images": IMAGES, "--cache": self.cache, "--shard-samples": 2}
        given |= {
            "--format": self.shard_format,
            "--device": "cpu",
            "--host-threads": 1,
            "--rank": rank,
            "--world-size": workers,
        }
        return self.door.start_with(fault, "cache-teacher", "--steal", *(word for pair in given.items() for word in pair))

    def disturb(self, chance: random.Random, kind: str, found: Round) -> None:
        if kind.startswith("S3"):
            self.s3_fault(chance, kind)
        fault = self.in_process(chance, kind)
        workers = [self.start(fault)] if kind != "two jobs" else [self.start(None), self.start(None)]
        allowed = {"clock": (0,), "two jobs": (0,)}.get(kind, (0, RESUMABLE))
        if kind in _SIGNALS:
            time.sleep(chance.random() * self.seconds)
            with suppress(ProcessLookupError):
                os.kill(workers[0].pid, _SIGNALS[kind])
            # Before a job begins, a signal ends its process as it ends any other.
            allowed = (0, -_SIGNALS[kind]) if kind == "kill -9" else (0, RESUMABLE, -_SIGNALS[kind])
        for worker in workers:
            self.expect(found, kind, *wait_for(worker, self.patience, found), *allowed)

    def finish(self, found: Round) -> None:
        code, words = wait_for(self.start(None), self.patience, found)
        if code != 0:
            found.problems.append(f"undisturbed: exit code {code}: {words[-1500:]}")
            return
        outcome = look_at(self.cache, [], [], 0)
        if not outcome.sound or outcome.content_sha256 != self.expected[self.shard_format]:
            found.problems.append(f"the cache: {outcome}")


class StageTwoRounds(Rounds):
    """``alignkd distill``, from a cache that is whole."""

    stage = "stage two"
    kinds = (
        *("kill -9", "SIGTERM", "SIGHUP", "ENOSPC write", "EIO write", "ESTALE read", "EIO read", "clock", "two jobs"),
        *("loader killed", "full disk"),
    )
    steps = 12

    def undisturbed(self) -> None:
        for shard_format in FORMATS:
            given = {"--teacher": TEACHER, "--data": self.data, "--images": IMAGES, "--device": "cpu", "--format": shard_format}
            words = [word for pair in given.items() for word in pair]
            made = self.door("cache-teacher", *words, "--cache", self.folder / shard_format, "--shard-samples", 4)
            assert made.code == 0, made.stderr
        self.out, self.shard_format = self.folder / "expected-run", FORMATS[0]
        started = time.perf_counter()
        finished = self.start(None, resume=False).finish()
        assert finished.code == 0, finished.stderr
        self.seconds = time.perf_counter() - started
        self.expected = student_sha256(self.out)

    def prepare(self, chance: random.Random, number: int) -> str:
        self.shard_format, self.out = chance.choice(FORMATS), self.folder / f"run-{number}"
        return f"local {self.shard_format}"

    def start(self, fault: dict[str, object] | None, *, resume: bool = True, loaders: int = 0) -> Running:
        """A training, continued where there is something to continue."""
        given = {"--student": STUDENT, "--data": self.data, "--images": IMAGES, "--cache": self.folder / self.shard_format}
        given |= {"--out": self.out, "--max-steps": self.steps, "--epochs": 40, "--batch-size": 2, "--learning-rate": "1e-3"}
        given |= {"--save-steps": 3, "--log-steps": 1, "--workers": loaders, "--device": "cpu", "--report-to": "none"}
        more = ["--resume"] if resume and (self.out / "run.json").exists() else []
        return self.door.start_with(fault, "distill", *(word for pair in given.items() for word in pair), *more)

    def disturb(self, chance: random.Random, kind: str, found: Round) -> None:
        if kind == "full disk":
            self.full_disk(chance, found)
            return
        running = self.start(self.in_process(chance, kind), loaders=2 if kind == "loader killed" else 0)
        allowed: tuple[int, ...] = (0,) if kind == "clock" else (0, RESUMABLE)
        if kind in _SIGNALS:
            time.sleep(chance.random() * self.seconds)
            with suppress(ProcessLookupError):
                os.kill(running.pid, _SIGNALS[kind])
            allowed = (0, -_SIGNALS[kind]) if kind == "kill -9" else (0, RESUMABLE, -_SIGNALS[kind])
        elif kind == "loader killed":
            while not ended(running.pid) and not children(running.pid):
                time.sleep(0.01)
            for child in children(running.pid)[-1:]:
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
        elif kind == "two jobs":
            while not ended(running.pid) and not (self.out / "run.json").exists():
                time.sleep(0.01)
            code, words = wait_for(self.start(None), self.patience, found)
            # The first job may have ended: then the second continues it. Where both continue, the second may be first.
            self.expect(found, "second job", code, words, 0, 2)
            allowed = (*allowed, 2) if code == 0 else allowed
        self.expect(found, kind, *wait_for(running, self.patience, found), *allowed)

    def full_disk(self, chance: random.Random, found: Round) -> None:
        """A run on a disk too small for it, which grows before the run is continued."""
        self.out.mkdir(exist_ok=True)
        size = chance.randint(200, 6000)
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", self.out], capture_output=True, check=False
        )
        if mounted.returncode:  # not root: nothing to fill
            found.faults.remove("full disk")
            return
        try:
            self.expect(found, "full disk", *wait_for(self.start(None), self.patience, found), 0, RESUMABLE)
            subprocess.run(["mount", "-o", "remount,size=400m", self.out], check=True)
            code, words = wait_for(self.start(None), self.patience, found)
            if code != 0 or student_sha256(self.out) != self.expected:
                found.problems.append(f"after the disk grew: exit code {code}: {words[-1500:]}")
        finally:
            subprocess.run(["umount", self.out], check=True)

    def finish(self, found: Round) -> None:
        code, words = wait_for(self.start(None), self.patience, found)
        if code != 0:
            found.problems.append(f"undisturbed: exit code {code}: {words[-1500:]}")
            return
        steps = [line["step"] for line in metrics(self.out)]
        if steps != list(range(1, self.steps + 1)):
            found.problems.append(f"the log has the steps {steps}")
        if student_sha256(self.out) != self.expected:
            found.problems.append("the student's weights differ from those of an undisturbed run")
        if json.loads((self.out / "result.json").read_text())["steps"] != self.steps:
            found.problems.append("result.json is not that of the whole run")
