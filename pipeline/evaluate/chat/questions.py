"""Where questions come from: options, a terminal with a prompt, or a pipe."""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import TextIO

from alignkd.errors import DataError
from alignkd.pipeline.evaluate.chat.conversation import check_question

LONGEST = 1_000_000
"""Characters of a line; a longer one is refused before it is read to its end."""


def piped(lines: TextIO) -> Iterator[str]:
    """One question a line, from a pipe or a file.

    Raises:
        DataError: it holds no line, or one that is too long.
        SampleError: a line is empty, or not UTF-8.
    """
    number = 0
    while line := lines.readline(LONGEST + 2):
        number += 1
        question = line.rstrip("\r\n")
        if len(question) > LONGEST:
            raise DataError(f"line {number} of standard input has more than {LONGEST:,} characters; expected one question")
        yield question
    if not number:
        raise DataError("standard input holds no question; expected one a line, or give --prompt TEXT")


def typed(edited: bool) -> Iterator[str]:
    """Questions that a user types, until an empty line, the end of input (Ctrl-D) or an interrupt (Ctrl-C).

    ``edited``: both ends are a terminal, so that lines can be edited and called back. Otherwise the prompt goes to standard
    error, since standard output is for answers.
    """
    if edited:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  input() uses it once it is imported
    while True:
        try:
            line = input("> ") if edited else _asked()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if not line.strip():
            return
        yield line


def _asked() -> str:
    print("> ", end="", file=sys.stderr, flush=True)
    if not (line := sys.stdin.readline(LONGEST + 2)):
        raise EOFError
    return line.rstrip("\r\n")


def checked(questions: Iterable[str]) -> tuple[str, ...]:
    """Questions of options, all of which are checked before a model is loaded.

    Raises:
        SampleError: one is empty, or not UTF-8.
    """
    for question in (found := tuple(questions)):
        check_question(question)
    return found
