"""Read the folder of a run, which may still be written, may have been killed, and may come from others."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignkd.errors import DataError, wrap_errors
from alignkd.pipeline.report.runs.run import Run, unique_names
from alignkd.pipeline.runtime.out_folder.holder import parse_holder
from alignkd.pipeline.runtime.printable import printable
from alignkd.pipeline.runtime.redact import redacted, redacted_text
from alignkd.plain_files import read_plain

_MOST_BYTES = 2**28
_MOST_METRICS_BYTES = 2**30
_MOST_LOCK_BYTES = 2**16
_LOCK = "run.lock"
"""Of :mod:`alignkd.pipeline.runtime.out_folder.lock`, which needs torch."""


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """The runs in these folders, in their order.

    Raises:
        DataError: a folder is no run of ``alignkd distill``, or one of its files is damaged.
    """
    paths = [Path(folder) for folder in folders]
    return [_read_run(path, redacted_text(name)) for path, name in zip(paths, unique_names(paths), strict=True)]


def _read_run(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        found = "is not a folder" if folder.exists() else "does not exist"
        raise DataError(f"{folder} {found}; give the --out folder of an alignkd distill")
    record = _record(folder)
    lines, torn = _metrics(folder / "metrics.jsonl")
    result = _result(folder / "result.json")
    settings, step = record["configuration"], int(lines[-1]["step"]) if lines else 0
    state = "finished" if result is not None else _unfinished(folder, step, settings.get("steps"))
    return Run(folder, name, redacted(record), tuple(lines), torn, redacted(result), state)


def _record(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    if not path.exists():
        raise DataError(
            f"{folder} is not a training run: it holds no run.json; give the --out folder of an alignkd distill (of an alignkd"
            " demo: one of its student-... folders)"
        )
    record = _object(path)
    if record.get("command", "distill") != "distill":
        wrote = printable(str(record["command"])[:60])
        raise DataError(
            f"{folder} is not a training run: alignkd {wrote} wrote it; give the --out folder of an alignkd distill (of a demo:"
            " one of its student-... folders)"
        )
    settings = record.get("configuration")
    if not isinstance(settings, dict) or not isinstance(settings.get("recipe"), dict):
        raise DataError(f"{path} is damaged: it holds no configuration with a recipe; restore it, or leave this run out")
    return record


def _object(path: Path) -> dict[str, Any]:
    damaged = f"{path} is damaged, expected one JSON object: restore it, or leave this run out"
    with wrap_errors(DataError, damaged, ValueError, RecursionError, OSError):
        value = json.loads(read_plain(path, _MOST_BYTES))
    if not isinstance(value, dict):
        raise DataError(damaged)
    return value


def _result(path: Path) -> dict[str, Any] | None:
    return _object(path) if path.exists() else None


def _metrics(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """The log lines, and whether the last one was cut short: by a kill, or because it is being written."""
    if not path.exists():
        return [], False
    with wrap_errors(DataError, f"{path} cannot be read: restore it, or leave this run out", OSError):
        content = read_plain(path, _MOST_METRICS_BYTES)
    texts = content.split(b"\n")
    lines = list[dict[str, Any]]()
    for place, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        try:
            lines.append(_line(text))
        except (ValueError, RecursionError) as error:
            if place == len(texts):  # no line break after it
                return lines, True
            raise DataError(
                f"{path}, line {place}, is damaged, expected a JSON object with a step ({printable(str(error)[:200])}): restore"
                " the file, or remove the line"
            ) from error
    return lines, False


def _line(text: bytes) -> dict[str, Any]:
    line = json.loads(text)
    if not isinstance(line, dict):
        raise ValueError("found no object")
    step = line.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**53:
        raise ValueError(f"its step is {str(step)[:40]!r}")
    return line


def _unfinished(folder: Path, step: int, steps: object) -> str:
    """The state of a run without a result: does it still run?"""
    of = f" of {steps:,}" if isinstance(steps, int) else ""
    where = f"at step {step:,}{of}" if step else "before its first log line"
    try:
        holder = parse_holder(read_plain(folder / _LOCK, _MOST_LOCK_BYTES))
    except (OSError, ValueError):
        holder = None
    if holder is not None and holder.is_alive():
        return f"runs now, {where}"
    if holder is not None and holder.is_alive() is None:
        return f"not finished, {where}; it may still run on {holder.host}"
    return f"not finished: stopped {where}; distill continues it with --resume"
