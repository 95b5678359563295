"""One folder, one run: a file in it names the run that writes there, so that a second one is refused.

A run that was killed leaves its file. On the same machine, process id and start time tell that it is dead. On another machine,
which sees the folder through a shared file system, it is watched: a living run touches its file every few seconds. No clock of
one machine is compared with that of another.
"""

import json
import logging
import os
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from threading import Event, Thread

from alignkd.errors import ConfigError
from alignkd.pipeline.runtime.out_folder.holder import Holder, parse_holder
from alignkd.pipeline.runtime.processes import Processes
from alignkd.pipeline.runtime.signals import StopFlag

NAME = "run.lock"

LIFE_SIGN_S = 15.0
"""Seconds between two touches of the file."""

DEAD_AFTER_S = 300.0
"""Seconds without a touch after which a run on another machine counts as dead: longer than one call may hold up Python."""

_log = logging.getLogger(__name__)


class RunLock:
    """The hold of this process on a folder, from :meth:`take` to :meth:`release`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / NAME
        self.holder = Holder.here()
        self._content = json.dumps(asdict(self.holder), indent=2).encode()
        self._ended = Event()

    def take(self, check_stop: Callable[[], None], sleep: Callable[[float], object] = time.sleep) -> None:
        """Take the folder. ``check_stop`` is called while a run on another machine is watched.

        Raises:
            ConfigError: a living run holds it.
        """
        while not self._create_alone():
            content = _content(self.path)
            if content is None:
                continue
            found = parse_holder(content)
            alive = found.is_alive() if found else None
            if alive is None:
                alive = self._shows_life(found, check_stop, sleep)
            if alive:
                raise self._refusal(found)
            with _alone_in(self.folder):
                self._remove(content)
        Thread(target=self._show_life, name="run-lock", daemon=True).start()

    def check(self) -> None:
        """Call before the run's state is written.

        Raises:
            ConfigError: another run has taken the folder, as this process showed no life for too long.
            FileNotFoundError: folder or file were removed.
        """
        content = self.path.read_bytes()
        if content != self._content:
            raise self._refusal(parse_holder(content))

    def release(self) -> None:
        """Give the folder back, if it is still held."""
        self._ended.set()
        if _content(self.path) == self._content:
            with suppress(OSError):
                self.path.unlink()

    def _refusal(self, found: Holder | None) -> ConfigError:
        who = str(found) if found else "a run that left no name"
        return ConfigError(
            f"--out {self.folder} is in use by another run: {who}. Wait until it ends, stop it, or choose another --out. If you"
            f" know that it is dead, remove its lock: rm {shlex.quote(str(self.path))}"
        )

    def _create_alone(self) -> bool:
        with _alone_in(self.folder):
            return self._create()

    def _create(self) -> bool:
        part = self.path.with_name(f"{NAME}.{self.holder.run_id}")
        try:
            part.write_bytes(self._content)
            try:
                os.link(part, self.path)
            except FileExistsError:
                return False
            except OSError:  # a file system without hard links
                with suppress(FileExistsError), self.path.open("xb") as file:
                    file.write(self._content)
            return _content(self.path) == self._content
        finally:
            part.unlink(missing_ok=True)

    def _shows_life(self, found: Holder | None, check_stop: Callable[[], None], sleep: Callable[[float], object]) -> bool:
        _log.warning(
            "%s is locked by %s: waiting up to %.0f seconds for a sign of life", self.folder, found or "a run", DEAD_AFTER_S
        )
        before, waited = _touched(self.path), 0.0
        while waited < DEAD_AFTER_S:
            check_stop()
            sleep(LIFE_SIGN_S / 3)
            waited += LIFE_SIGN_S / 3
            now = _touched(self.path)
            if now != before:
                return now is not None
        _log.warning("no sign of life: the lock is taken over")
        return False

    def _remove(self, content: bytes) -> None:
        """Remove a dead run's file; another run may be doing the same, and have made its own in the meantime."""
        if _content(self.path) != content:
            return
        aside = self.path.with_name(f"{NAME}.{self.holder.run_id}.dead")
        with suppress(FileNotFoundError):
            self.path.rename(aside)
            if aside.read_bytes() != content:
                with suppress(FileExistsError):
                    os.link(aside, self.path)
            aside.unlink()

    def _show_life(self) -> None:
        while not self._ended.wait(LIFE_SIGN_S):
            if _content(self.path) == self._content:
                with suppress(OSError):
                    os.utime(self.path)


@contextmanager
def held(folder: Path, check_stop: Callable[[], None] = lambda: None) -> Iterator[RunLock]:
    """Hold a folder, which is made if need be, and removed again where nothing was put into it.

    Raises:
        ConfigError: a living run holds it.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = RunLock(folder)
    try:
        lock.take(check_stop)
        yield lock
    finally:
        lock.release()
        if new:
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def hold_by_first(folder: Path, processes: Processes, stop: StopFlag) -> Iterator[RunLock | None]:
    """Have the first process of a job hold a folder; the others get None. All of them are refused together.

    Raises:
        ConfigError: a living run holds it.
    """
    with ExitStack() as stack:
        held_here: list[RunLock] = []
        processes.by_first(lambda: held_here.append(stack.enter_context(held(folder, stop.check))))
        yield held_here[0] if held_here else None


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep others out of a folder for a moment, where its file system can; where not, the file's name alone decides."""
    if os.name == "nt":  # Windows cannot open a folder
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _touched(path: Path) -> tuple[int, bytes] | None:
    """When a file was touched. It is opened, for a network file system asks its server then."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns, file.read()
    except OSError:
        return None
