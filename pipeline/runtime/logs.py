"""The log of a job: one set-up for standard error and a file, lines of text or JSON objects, always with a time.

Library code only gets loggers by name; nothing here runs unless a command asks for it.
"""

import logging
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.text import Text

from alignkd.errors import ConfigError
from alignkd.pipeline.config.log import LogConfig
from alignkd.pipeline.runtime import progress
from alignkd.pipeline.runtime.printable import json_text, printable_lines
from alignkd.pipeline.runtime.ranks import Worker, find_worker
from alignkd.pipeline.runtime.redact import redacted, redacted_text
from alignkd.version import __version__

_STYLES = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "red"}
_PRINT_THEMSELVES = ("DeepSpeed",)
"""Loggers whose libraries print their lines on standard error or output, whatever the program's logging is."""

_log = logging.getLogger("alignkd")


@dataclass(frozen=True)
class Origin:
    """Where lines come from: the host, and the worker where there are several."""

    worker: Worker
    host: str

    @property
    def words(self) -> str:
        """What a line of text says of it; nothing for the only worker."""
        return f"{self.host} {self.worker} " if self.worker.world_size > 1 else ""


class TextFormatter(logging.Formatter):
    """Time in UTC, level, host and rank of several workers, message. Further lines of a message are indented."""

    def __init__(self, origin: Origin) -> None:
        super().__init__()
        self.origin = origin

    def format(self, record: logging.LogRecord) -> str:
        """Logging's hook."""
        when = datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
        source = "" if record.name.split(".")[0] == "alignkd" else f"{record.name}: "
        trace = f"\n{self.formatException(record.exc_info)}" if record.exc_info else ""
        text = f"{when} {record.levelname:<7} {self.origin.words}{source}{record.getMessage()}{trace}"
        return printable_lines(redacted_text(text.rstrip("\n")), indent="    ")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time``, ``level``, ``logger``, ``message``, ``rank``, ``world_size``, ``host``, ``pid``.

    ``exception`` is the traceback of an error; what a record carries as ``fields`` stands beside them.
    """

    def __init__(self, origin: Origin) -> None:
        super().__init__()
        self.origin = origin

    def format(self, record: logging.LogRecord) -> str:
        """Logging's hook."""
        when = datetime.fromtimestamp(record.created, UTC)
        entry = {
            "time": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "rank": self.origin.worker.rank,
            "world_size": self.origin.worker.world_size,
            "host": self.origin.host,
            "pid": record.process,
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json_text(redacted(entry))


class _StderrHandler(logging.Handler):
    """Lines on standard error, above a progress bar where one is drawn."""

    def __init__(self, *, writes_json: bool) -> None:
        super().__init__()
        self.writes_json = writes_json

    def emit(self, record: logging.LogRecord) -> None:
        """Logging's hook. Errors that the command line shows itself, and progress that a bar shows, are left out."""
        console = progress.stderr_console
        if not self.writes_json and (hasattr(record, "shown") or (hasattr(record, "progress") and console.is_terminal)):
            return
        line = self.format(record)
        try:
            if console.is_terminal and not self.writes_json:
                console.print(Text(line, style=_STYLES.get(record.levelno, "")), soft_wrap=True)
            else:
                print(line, file=sys.stderr, flush=True)
        except (OSError, ValueError):  # standard error is closed: the job goes on without it
            self.close()


class _FileHandler(logging.FileHandler):
    """Lines in a file. Where it can no longer be written, the job goes on, and says so once."""

    broken = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        if not self.broken:
            self.broken = True
            error = sys.exc_info()[1]
            print(f"warning: --log-file {self.baseFilename} cannot be written: {error}", file=sys.stderr)


class _Forward(logging.Filter):
    """Gives the lines of a logger to our handlers, and keeps them from its own."""

    def __init__(self, handlers: list[logging.Handler]) -> None:
        super().__init__()
        self.handlers = handlers

    def filter(self, record: logging.LogRecord) -> bool:
        """Logging's hook."""
        for handler in self.handlers if record.levelno >= logging.WARNING else ():
            handler.handle(record)
        return False


def worker_of_log(rank: int | None, world_size: int | None) -> Worker:
    """The worker that lines name: what flags or the launcher say; the only one where they say nothing that can be used."""
    try:
        return find_worker(rank, world_size)
    except ConfigError:  # the job itself refuses it, in its own words
        return Worker()


def start_logging(config: LogConfig, worker: Worker) -> Callable[[], None]:
    """Log as configured; the function returned ends that, and leaves logging as it was.

    Raises:
        ConfigError: the log file cannot be written.
    """
    origin, root = Origin(worker, platform.node()), logging.getLogger()
    formatter = JsonFormatter(origin) if config.log_json else TextFormatter(origin)
    handlers: list[logging.Handler] = [_StderrHandler(writes_json=config.log_json)]
    if config.log_file is not None:
        handlers.append(_open(_file_of(config.log_file, worker)))
    level, root_level = _log.level, root.level
    _log.setLevel(config.log_level.upper())
    root.setLevel(logging.WARNING)  # of other libraries; some of them log credentials below it
    for handler in handlers:
        handler.setFormatter(formatter)
        root.addHandler(handler)
    others = _Forward(handlers)
    for name in _PRINT_THEMSELVES:
        logging.getLogger(name).addFilter(others)
    logging.captureWarnings(True)
    progress.bars_drawn = not config.log_json

    def stop() -> None:
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
        for name in _PRINT_THEMSELVES:
            logging.getLogger(name).removeFilter(others)
        _log.setLevel(level)
        root.setLevel(root_level)
        logging.captureWarnings(False)
        progress.bars_drawn = True

    return stop


def _file_of(name: str, worker: Worker) -> Path:
    path = Path(name)
    return path if worker.world_size == 1 else path.with_name(f"{path.stem}.rank{worker.rank}{path.suffix}")


def _open(path: Path) -> logging.Handler:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return _FileHandler(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise ConfigError(f"--log-file {path} cannot be written: {error.strerror}; choose another file") from error


def log_start(command: str, **about: object) -> None:
    """The line that says what starts: version and host, and ``about``, such as rank, device, data, cache and plan."""
    known = {"host": platform.node(), **{name: value for name, value in about.items() if value is not None}}
    words = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in known.items())
    # Every line of JSON has host and rank already.
    fields = {"command": command, "version": __version__, **{k: v for k, v in known.items() if k not in ("host", "rank")}}
    _log.info("alignkd %s %s starts: %s", __version__, command, words, extra={"fields": fields})
