"""The scores of a model card, with their intervals, from what benchmark runs and evaluations left."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from alignkd.errors import DataError, wrap_errors
from alignkd.pipeline.hub.card import CardScore
from alignkd.pipeline.report.benchmarks.comparison import compare
from alignkd.pipeline.report.benchmarks.out_folders import field, read_models
from alignkd.plain_files import read_plain

_RESAMPLES = 2000
_BYTES = 2**28


def card_scores(folders: Sequence[str]) -> list[CardScore]:
    """The scores of several --out folders, in their order; the intervals are those of ``benchmark report``.

    Raises:
        DataError: a folder is no --out of ``benchmark run`` or ``evaluate``, or is not finished, or damaged.
    """
    return [score for folder in folders for score in _of_folder(Path(folder))]


def _of_folder(folder: Path) -> list[CardScore]:
    if (folder / "result.json").exists():
        return [_accuracy(folder)]
    comparison = compare(read_models([str(folder)]), resamples=_RESAMPLES, seed=0)
    (model,) = comparison.models
    scored = comparison.scores[model.name]
    return [
        CardScore(
            result.title if result.limit is None else f"{result.title}, the first {result.limit:,} questions",
            scored[name].value,
            result.unit,
            scored[name].interval,
            len(result.lines),
            result.protocol,
            result.model,
        )
        for name, result in model.results.items()
    ]


def _accuracy(folder: Path) -> CardScore:
    path = folder / "result.json"
    with wrap_errors(DataError, f"{path} cannot be read; run the same alignkd evaluate again", OSError, ValueError):
        found = json.loads(read_plain(path, _BYTES))
    if not isinstance(found, dict) or "accuracy" not in found:
        raise DataError(f"{path} is no result of alignkd evaluate; give the --out of an evaluate or of a benchmark run")
    ends = [field({"end": end}, "end", float, path) for end in field(found, "interval_95", list, path)]
    accuracy, metric = field(found, "accuracy", float, path), field(found, "metric", str, path)
    if len(ends) != 2 or not all(math.isfinite(number) for number in (accuracy, *ends)):
        raise DataError(f"{path}: accuracy and interval_95 are not finite numbers; run the same alignkd evaluate again")
    low, high = ends
    return CardScore(
        f"{folder.name} (alignkd evaluate)",
        100 * accuracy,
        "percent",
        (100 * low, 100 * high),
        field(found, "answered", int, path),
        f"metric {metric}",
        _model(folder / "run.json"),
    )


def _model(path: Path) -> str:
    try:
        return str(json.loads(read_plain(path, _BYTES))["configuration"]["model"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
