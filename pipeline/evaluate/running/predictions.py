"""``predictions.jsonl`` of ``alignkd evaluate``: written batch by batch, and continued by the same command.

While a run is under way, ``parts/settings.json`` says what its predictions were made with; it goes when the result is there.
"""

import json
import os
import shutil
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from io import RawIOBase
from pathlib import Path
from typing import Any

from alignkd.errors import ConfigError
from alignkd.models.vlm import Vlm
from alignkd.pipeline.config.evaluate import EvaluateConfig
from alignkd.pipeline.evaluate.running import identity
from alignkd.pipeline.evaluate.running.parts import AGAIN
from alignkd.pipeline.runtime.out_folder.write_faults import explained_write_faults
from alignkd.pipeline.runtime.printable import json_text
from alignkd.pipeline.runtime.run_record import write_run_record
from alignkd.plain_files import read_plain
from alignkd.plugins import loaded_plugins

NAME = "predictions.jsonl"
_LARGEST = 4 * 2**30
_NO_MATTER = frozenset({"out", "batch_size", "device", "max_rejected", "download", "local_cache"})
"""Settings that change no prediction."""


class Predictions:
    """The lines of a run: those that are there already, in the order of the samples, and what appends to them."""

    def __init__(self, out: Path | None, file: RawIOBase | None, kept: Sequence[Mapping[str, Any]] = ()) -> None:
        self.out, self.file, self.kept = out, file, deque(kept)

    def take(self, about: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The line of the next sample, of which ``about`` holds some fields; None where it has none yet."""
        if not self.kept or any(self.kept[0].get(name) != value for name, value in about.items()):
            return None
        return self.kept.popleft()

    def write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Append lines; they are in the file when this returns."""
        if self.file is None:
            return
        assert self.out is not None
        left = memoryview("".join(json_text(line) + "\n" for line in lines).encode())
        with explained(self.out, NAME):
            while left:
                left = left[self.file.write(left) or 0 :]

    def check_all_taken(self) -> None:
        """Call when all samples were seen.

        Raises:
            ConfigError: there are lines that are of none of them.
        """
        if self.kept:
            raise ConfigError(
                f"{self.out}/{NAME} holds predictions that are not of these questions (the first:"
                f" {self.kept[0].get('id')!r:.80}): remove it, and run the same command again"
            )

    def end(self) -> None:
        """The result is written: there is nothing to continue."""
        if self.out is not None:
            shutil.rmtree(self.out / "parts", ignore_errors=True)


@contextmanager
def open_predictions(
    config: EvaluateConfig, vlm: Vlm, template: str, prompt_date: str, data_sha256: str
) -> Iterator[Predictions]:
    """The predictions of a run, continued where the last one with the same settings was interrupted.

    Raises:
        TransientError, CheckpointError: they cannot be written.
    """
    if config.out is None:
        yield Predictions(None, None)
        return
    out = Path(config.out)
    given = _identity(config, vlm, template, prompt_date) | {"data_sha256": data_sha256}
    kept = _whole_lines(out / NAME) if identity.stored(out / "parts") == given else []
    with explained(out, "run.json"):
        write_run_record(out / "run.json", "evaluate", asdict(config))
        (out / "result.json").unlink(missing_ok=True)  # of an earlier run, whose predictions are written over
        # A buffer's rest would fail once more when it is closed.
        file = (out / NAME).open("ab" if kept else "wb", buffering=0)
    with file:
        if kept:
            _, size = kept[-1]
            os.truncate(out / NAME, size)  # a torn line
        else:
            identity.put(out / "parts", given)
        yield Predictions(out, file, [line for line, _ in kept])


def prompt_date_of(config: EvaluateConfig) -> str | None:
    """The date of a run's prompts: the one given, or that of the interrupted run which it may continue."""
    there = identity.stored(Path(config.out) / "parts") if config.out is not None else {}
    return config.prompt_date or there.get("prompt_date") or None


def explained(out: Path, what: str) -> AbstractContextManager[None]:
    """See :func:`explained_write_faults`."""
    return explained_write_faults(out, what, again=AGAIN)


def _identity(config: EvaluateConfig, vlm: Vlm, template: str, prompt_date: str) -> dict[str, Any]:
    settings = {name: value for name, value in asdict(config).items() if name not in _NO_MATTER}
    given = {**settings, "template": template, "prompt_date": prompt_date, **identity.of_model(vlm)}
    plugins = [asdict(plugin) for plugin in loaded_plugins()]
    found: dict[str, Any] = json.loads(json.dumps({**given, "plugins": plugins}, default=str))
    return found


def _whole_lines(path: Path) -> list[tuple[dict[str, Any], int]]:
    """The lines up to the first that is torn or no JSON object, each with the size of the file up to its end."""
    try:
        *lines, _torn = read_plain(path, _LARGEST).split(b"\n")
    except (OSError, ValueError):
        return []
    found, size = list[tuple[dict[str, Any], int]](), 0
    for line in lines:
        size += len(line) + 1
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(value, dict) or not isinstance(value.get("correct"), bool):
            break
        found.append((value, size))
    return found
