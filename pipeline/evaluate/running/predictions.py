"""``predictions.jsonl`` of ``alignkd evaluate``: written batch by batch, and continued by the same command.

While a run is under way, lines are in the order of the batches, and each has the ``index`` of its sample; at the end they are
put in the order of the samples, without it.

While a run is under way, ``parts/settings.json`` says what its predictions were made with; it goes when the result is there.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from io import RawIOBase
from pathlib import Path
from typing import Any

from alignkd.errors import ConfigError
from alignkd.models.vlm import Vlm
from alignkd.pipeline.config.evaluate import EvaluateConfig
from alignkd.pipeline.data.contract import Samples
from alignkd.pipeline.evaluate.running import identity
from alignkd.pipeline.evaluate.running.parts import AGAIN, put_text
from alignkd.pipeline.runtime.out_folder.write_faults import explained_write_faults
from alignkd.pipeline.runtime.printable import json_text
from alignkd.pipeline.runtime.run_record import write_run_record
from alignkd.plain_files import read_plain
from alignkd.plugins import loaded_plugins

NAME = "predictions.jsonl"
_LARGEST = 4 * 2**30
_NO_MATTER = frozenset({"out", "batch_size", "device", "max_rejected", "download", "local_cache"})
"""Settings that change no prediction."""


Line = Mapping[str, Any]


class Predictions:
    """The lines of a run: ``kept`` by sample are those that are there already; and what appends to them."""

    def __init__(self, out: Path | None, file: RawIOBase | None, kept: Mapping[int, Line] | None = None) -> None:
        self.out, self.file, self.kept = out, file, dict(kept or {})

    def check(self, about: Callable[[int], Line]) -> None:
        """Compare the lines that are there with some fields of theirs: ``about`` gives those of a sample.

        Raises:
            ConfigError: a line is of another sample, or of none.
        """
        for index, line in self.kept.items():
            if any(line.get(name) != value for name, value in about(index).items()):
                raise ConfigError(
                    f"{self.out}/{NAME} holds predictions that are not of these questions (the first:"
                    f" {line.get('id')!r:.80}): remove it, and run the same command again"
                )

    def write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Append lines; they are in the file when this returns."""
        if self.file is None:
            return
        assert self.out is not None
        left = memoryview("".join(json_text(line) + "\n" for line in lines).encode())
        with explained(self.out, NAME):
            while left:
                left = left[self.file.write(left) or 0 :]

    def end(self) -> None:
        """The result is written: lines are put in the order of the samples, and there is nothing to continue.

        Raises:
            TransientError, CheckpointError: they cannot be written.
        """
        if self.out is None:
            return
        found = {line.pop("index"): line for line, _ in _whole_lines(self.out / NAME)}
        put_text(self.out / NAME, "".join(json_text(found[index]) + "\n" for index in sorted(found)))
        shutil.rmtree(self.out / "parts", ignore_errors=True)


@contextmanager
def open_predictions(
    config: EvaluateConfig, vlm: Vlm, template: str, prompt_date: str, samples: Samples
) -> Iterator[Predictions]:
    """The predictions of a run, continued where the last one with the same settings was interrupted.

    Raises:
        TransientError, CheckpointError: they cannot be written.
    """
    if config.out is None:
        yield Predictions(None, None)
        return
    out = Path(config.out)
    given = _identity(config, vlm, template, prompt_date) | {"data_sha256": hashlib.sha256(samples.keys.tobytes()).hexdigest()}
    kept = _whole_lines(out / NAME, len(samples)) if identity.stored(out / "parts") == given else []
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
        yield Predictions(out, file, {line["index"]: line for line, _ in kept})


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


def _whole_lines(path: Path, samples: int | None = None) -> list[tuple[dict[str, Any], int]]:
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
        index = value.get("index")
        if type(index) is not int or not 0 <= index < (index + 1 if samples is None else samples):
            break
        found.append((value, size))
    return found
