"""Who holds a folder, and whether that process is alive."""

import json
import os
import platform
import secrets
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alignkd.pipeline.runtime.redact import redacted


@dataclass(frozen=True)
class Holder:
    """Who holds a folder. ``machine``, ``boot`` and ``pids`` (the space of process ids, of a container) tell whether a
    process id of it means anything here."""

    host: str
    machine: str
    boot: str
    pids: str
    pid: int
    process_start: str
    started: str
    command: str
    run_id: str

    @classmethod
    def here(cls) -> "Holder":
        """This process."""
        return cls(
            host=platform.node(),
            machine=_read("/etc/machine-id"),
            boot=_read("/proc/sys/kernel/random/boot_id"),
            pids=_pid_space(),
            pid=os.getpid(),
            process_start=start_of(os.getpid()) or "",
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            command=_command(),
            run_id=secrets.token_hex(8),
        )

    def is_alive(self) -> bool | None:
        """Whether the process exists; None where that cannot be told from here."""
        here = Holder.here()
        if (self.host, self.machine) == (here.host, here.machine) and self.machine and self.boot != here.boot:
            return False  # this machine was started again since
        if (self.host, self.boot, self.pids) != (here.host, here.boot, here.pids):
            return None
        return start_of(self.pid) == self.process_start

    def __str__(self) -> str:
        return f"{self.command} (process {self.pid} on {self.host}, started {self.started})"


def parse_holder(content: bytes) -> Holder | None:
    """The holder that a lock file names; None where it names none."""
    try:
        found = Holder(**json.loads(content))
    except (ValueError, TypeError, RecursionError):
        return None
    texts = [value for name, value in asdict(found).items() if name != "pid"]
    return found if isinstance(found.pid, int) and all(isinstance(text, str) for text in texts) else None


def _command() -> str:
    words: Any = redacted({"arguments": sys.argv[1:]})["arguments"]
    return " ".join([Path(sys.argv[0]).name, *map(str, words)])[:500]


def _read(path: str) -> str:
    try:
        return Path(path).read_bytes().decode(errors="replace").strip()
    except OSError:
        return ""


def _pid_space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def start_of(pid: int) -> str | None:
    """When a process started, in ticks of its machine; None if it has ended. Empty on systems without ``/proc``."""
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            return ""
        return ""
    stat = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return None if not stat or stat[0] in "ZX" else stat[19]
