"""Messages on the terminal: any character can be written, hidden ones are shown escaped, credentials are not shown."""

import io
import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import click

from alignkd.pipeline.runtime.printable import printable_lines
from alignkd.pipeline.runtime.redact import redacted_text


def make_streams_safe() -> None:
    """Let both streams take any character, whatever the locale, and show tracebacks as other messages are shown."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.excepthook = _show_traceback


@contextmanager
def shown_escaped() -> Iterator[None]:
    """Escape the messages of click's errors, which hold text that people typed or that others wrote."""
    try:
        yield
    except click.ClickException as error:
        error.message = message_text(error.message)  # type: ignore[misc]  # final to type checkers alone
        raise


def log_end(error: BaseException, *, bug: bool = False) -> bool:
    """Log the error that ends a command, if it logs at all; whether that has told the user, so that no more need be shown.

    The log of standard error has it only where its lines are JSON, which another line would spoil.
    """
    log = logging.getLogger("alignkd")
    if bug:
        log.critical("%s: %s", type(error).__name__, error, exc_info=error, extra={"shown": True})
    else:
        log.error("%s", error, extra={"shown": True})
    return any(getattr(handler, "writes_json", False) for handler in logging.getLogger().handlers)


def message_text(text: object) -> str:
    """A message as it is shown: without credentials, hidden characters escaped, its further lines indented."""
    return printable_lines(redacted_text(str(text)), indent="  ")


def _show_traceback(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    text = "".join(traceback.format_exception(kind, error, where))
    sys.stderr.write(printable_lines(redacted_text(text)))
