"""Run one command of alignkd in processes of its own, which end with it: no two steps share memory."""

import logging
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence

from alignkd.errors import AlignkdError, ConfigError
from alignkd.pipeline.runtime.signals import RESUMABLE, Interrupted, StopFlag

_POLL_S = 0.2
_log = logging.getLogger(__name__)


class StepError(AlignkdError):
    """A command that a round runs has failed."""


def command_line(launch: str, words: Sequence[str]) -> list[str]:
    """The words that start ``alignkd WORDS``; ``launch``: what starts a Python module on several processes, or nothing.

    Raises:
        ConfigError: ``launch`` has an open quote.
    """
    try:
        before = shlex.split(launch)
    except ValueError as error:
        raise ConfigError(f"--launch {launch!r}: {error}; expected words such as 'torchrun --nproc-per-node 8 -m'") from error
    return [*(before or [sys.executable, "-m"]), "alignkd", *words]


def run_command(name: str, words: Sequence[str], stop: StopFlag) -> None:
    """Run a command to its end. A signal is passed on, and the command's own way to stop is waited for.

    Raises:
        Interrupted: it stopped early, and the same command continues.
        ConfigError: it cannot be started.
        StepError: it failed; its own message is on standard error.
    """
    stop.check()
    _log.info("%s: %s", name, shlex.join(words))
    try:
        # In a session of its own: a terminal's Ctrl-C would reach it beside the signal that is passed on.
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True)
    except OSError as error:
        raise ConfigError(f"{words[0]} cannot be started: {error.strerror or error}; check --launch") from error
    code = _wait(process, stop)
    if code == 0:
        return
    if code == RESUMABLE or stop:
        raise Interrupted(f"{name} was stopped; run the same command with --resume to continue")
    words_of_end = f"with exit code {code}" if code > 0 else f"by {signal.Signals(-code).name}"
    raise StepError(
        f"{name} ended {words_of_end}; its message is above. Mend its cause, then run the same command with --resume"
    )


def _wait(process: subprocess.Popen[bytes], stop: StopFlag) -> int:
    passed_on = False
    try:
        while True:
            try:
                return process.wait(_POLL_S)
            except subprocess.TimeoutExpired:
                if stop and not passed_on:
                    passed_on = True
                    process.send_signal(signal.SIGTERM)
    except BaseException:
        process.kill()
        process.wait()
        raise
