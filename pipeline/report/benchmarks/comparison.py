"""Scores with their intervals, the papers' average, and models against each other on the questions that they share.

Shapes: B resamples.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from alignkd.pipeline.evaluate.benchmarks.registry import BENCHMARKS, SIX
from alignkd.pipeline.evaluate.statistics import (
    Difference,
    Floats,
    percentile_interval,
    resampled_sums,
    wilson_interval,
)
from alignkd.pipeline.report.benchmarks.formulas import Sums, checked_sums, picture_names, question_of, sums_of
from alignkd.pipeline.report.benchmarks.out_folders import Line, Model, Result

WILSON = "Wilson"
_POINTS_PER_PERCENT = {"mme": 20}
"""What the average divides a score by."""


@dataclass(frozen=True)
class Scored:
    """A score with its 95 % interval. ``method``: how it was found; ``resampled_B``: the score on each resample."""

    value: float
    unit: str
    interval: tuple[float, float] | None
    method: str
    pictures: int
    resampled_B: Floats


@dataclass(frozen=True)
class Average:
    """The papers' average. ``value``: None where there is none, and ``reason`` says why."""

    value: float | None = None
    interval: tuple[float, float] | None = None
    reason: str = ""


@dataclass(frozen=True)
class Compared:
    """Two models on the questions of one benchmark that they share; ``first``, ``second``: their figures on these.

    ``shared``: how many these are, of those that each was ``asked``. ``counted``: how many questions of
    these count; the passes of MMBench are one.
    """

    benchmark: str
    title: str
    unit: str
    first: float
    second: float
    difference: Difference
    shared: int
    counted: int
    asked: tuple[int, int]
    differences_B: Floats


@dataclass(frozen=True)
class Pair:
    """Two models. ``left_out``: why a benchmark of both is not compared, by its title. ``average``: of the papers' six."""

    first: str
    second: str
    compared: tuple[Compared, ...]
    left_out: Mapping[str, str]
    average: Difference | None


@dataclass(frozen=True)
class Comparison:
    """Everything that the page shows of several models. ``scores``: by name of the model, then of the benchmark."""

    models: tuple[Model, ...]
    scores: Mapping[str, Mapping[str, Scored]]
    averages: Mapping[str, Average]
    pairs: tuple[Pair, ...]
    seed: int
    resamples: int

    @property
    def benchmarks(self) -> list[str]:
        """Those that at least one model has, the six of the papers first, in their order."""
        return [name for name in BENCHMARKS if any(name in model.results for model in self.models)]

    def title_of(self, benchmark: str) -> str:
        """A benchmark's title."""
        return next(model.results[benchmark].title for model in self.models if benchmark in model.results)


def compare(models: Sequence[Model], *, resamples: int, seed: int) -> Comparison:
    """Compare models. The same folders, resamples and seed give the same figures.

    Raises:
        DataError: the lines of a result do not give its score.
    """
    scores = {
        model.name: {name: _scored(result, resamples, seed) for name, result in model.results.items()} for model in models
    }
    averages = {model.name: _average(model, scores[model.name]) for model in models}
    pairs = tuple(_pair(first, second, resamples, seed) for first, second in combinations(models, 2))
    return Comparison(tuple(models), scores, averages, pairs, seed, resamples)


def _seed(seed: int, benchmark: str) -> tuple[int, int]:
    return seed, zlib.crc32(benchmark.encode())


def _scored(result: Result, resamples: int, seed: int) -> Scored:
    sums = checked_sums(result)
    resampled = sums.figure(resampled_sums(sums.sums_PK, sums.strata_P, _seed(seed, result.benchmark), resamples))
    count = len(sums.pictures)
    if sums.independent is not None:
        low, high = wilson_interval(*sums.independent)
        return Scored(result.score, result.unit, (100 * low, 100 * high), WILSON, count, resampled)
    return Scored(result.score, result.unit, percentile_interval(resampled), "bootstrap by picture", count, resampled)


def _average(model: Model, scores: Mapping[str, Scored]) -> Average:
    if lacking := [name for name in SIX if name not in scores]:
        return Average(reason=f"lacks {', '.join(lacking)}")
    six = [model.results[name] for name in SIX]
    if limited := [result.benchmark for result in six if result.limit is not None]:
        return Average(reason=f"limited: {', '.join(limited)}")
    if len({result.protocol for result in six}) > 1:
        return Average(reason="of two protocols")
    resampled = _averaged({name: scores[name].resampled_B for name in SIX})
    value = _averaged({name: np.array([scores[name].value]) for name in SIX})[0]
    return Average(float(value), percentile_interval(resampled))


def _averaged(six: Mapping[str, Floats]) -> Floats:
    return np.asarray(sum(six[name] / _POINTS_PER_PERCENT.get(name, 1) for name in SIX) / len(SIX))


def _pair(first: Model, second: Model, resamples: int, seed: int) -> Pair:
    compared, left_out = [], {}
    for name in BENCHMARKS:
        if name in first.results and name in second.results:
            one, other = first.results[name], second.results[name]
            found = _compared(one, other, resamples, seed)
            if isinstance(found, str):
                left_out[one.title] = found
            else:
                compared.append(found)
    return Pair(first.name, second.name, tuple(compared), left_out, _average_difference(compared, first, second))


def _average_difference(compared: Sequence[Compared], first: Model, second: Model) -> Difference | None:
    found = {one.benchmark: one for one in compared}
    whole = all(name in found and found[name].asked == (found[name].shared,) * 2 for name in SIX)
    if not whole or any(model.results[name].limit is not None for model in (first, second) for name in SIX):
        return None
    value = _averaged({name: np.array([found[name].difference.value]) for name in SIX})[0]
    return Difference.of(float(value), _averaged({name: found[name].differences_B for name in SIX}))


def _compared(one: Result, other: Result, resamples: int, seed: int) -> Compared | str:
    if one.protocol != other.protocol:
        return f"the first followed the protocol {one.protocol}, the second {other.protocol}"
    first, second = shared_lines(one, other)
    if not first:
        return "they share no picture with the same questions"
    sums = sums_of(one.benchmark, one.protocol, first), sums_of(one.benchmark, one.protocol, second)
    sums = _same_pictures(*sums)
    if not sums[0].pictures:
        return "they share no question that counts"
    width = sums[0].sums_PK.shape[1]
    side_by_side = np.concatenate([sums[0].sums_PK, sums[1].sums_PK], axis=1)
    drawn = resampled_sums(side_by_side, sums[0].strata_P, _seed(seed, one.benchmark), resamples)
    differences = sums[1].figure(drawn[:, width:]) - sums[0].figure(drawn[:, :width])
    difference = Difference.of(sums[1].value - sums[0].value, differences)
    asked = len(one.lines), len(other.lines)
    figures = sums[0].value, sums[1].value
    counting = [a for a, b in zip(first, second, strict=True) if a.counted or b.counted]
    counted = len({question_of(line) for line in counting}) if one.benchmark == "mmbench" else len(counting)
    return Compared(one.benchmark, one.title, one.unit, *figures, difference, len(first), counted, asked, differences)


def _same_pictures(first: Sums, second: Sums) -> tuple[Sums, Sums]:
    """Both with the pictures that count in both: an answer may be missing in one of them."""
    both = set(first.pictures) & set(second.pictures)
    return _with_pictures(first, both), _with_pictures(second, both)


def _with_pictures(sums: Sums, kept: set[str]) -> Sums:
    rows = [row for row, name in enumerate(sums.pictures) if name in kept]
    pictures = tuple(sums.pictures[row] for row in rows)
    return replace(sums, pictures=pictures, sums_PK=sums.sums_PK[rows], strata_P=sums.strata_P[rows], independent=None)


def shared_lines(one: Result, other: Result) -> tuple[list[Line], list[Line]]:
    """The lines of two results about the pictures on which both were asked the same questions, in one order.

    Questions are the same if picture, id, category, right answers and the first line of the question are: what stands after it
    are options, OCR tokens and how to answer.
    """
    first, second = _keyed(one), _keyed(other)
    pictures = [dict(zip(keyed, picture_names(one.benchmark, list(keyed.values())), strict=True)) for keyed in (first, second)]
    apart = set(first) ^ set(second)
    spoilt = {names[key] for names in pictures for key in apart if key in names}
    kept = [key for key in first if key in second and not {pictures[0][key], pictures[1][key]} & spoilt]
    return [first[key] for key in kept], [second[key] for key in kept]


_Key = tuple[object, ...]


def _keyed(result: Result) -> dict[_Key, Line]:
    found: dict[_Key, Line] = {}
    times: dict[_Key, int] = {}
    for line in result.lines:
        head = line.question.split("\n", 1)[0]
        key = (str(line.id), line.images, line.category, line.answers, head)
        times[key] = times.get(key, 0) + 1
        found[(*key, times[key])] = line
    return found
