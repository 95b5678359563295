"""The figure of each benchmark from sums over pictures, so that pictures can be drawn again (P pictures, K sums).

The figures are those of the scorers in :mod:`alignkd.pipeline.evaluate.benchmarks`; on all pictures they equal the score in
``result.json``, which :func:`checked_sums` makes sure of.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from alignkd.errors import DataError
from alignkd.pipeline.evaluate.benchmarks.shared.mme_files import COGNITION, PERCEPTION
from alignkd.pipeline.evaluate.statistics import Figure, Floats
from alignkd.pipeline.report.benchmarks.out_folders import Line, Result

_ORDER = {name: place for place, name in enumerate((*PERCEPTION, *COGNITION))}
_KNOWN = {"mme": (*PERCEPTION, *COGNITION), "pope": ("adversarial", "random", "popular")}
_MOST_CATEGORIES = 200
_A_PASS = 1_000_000
"""Rows of MMBench with the same index below this are passes of one question."""


@dataclass(frozen=True)
class Sums:
    """``pictures``: their names, sorted. ``sums_PK``: of each. ``strata_P``: groups whose size is part of the design.

    ``figure``: of sums over pictures. ``independent``: right and all, where every picture has one question that is right or
    wrong; else None.
    """

    pictures: tuple[str, ...]
    strata_P: np.ndarray[tuple[int], np.dtype[np.int64]]
    sums_PK: Floats
    figure: Figure
    independent: tuple[int, int] | None = None

    @property
    def value(self) -> float:
        """The figure over all pictures."""
        return float(self.figure(self.sums_PK.sum(axis=0)))


def checked_sums(result: Result) -> Sums:
    """The sums of a result.

    Raises:
        DataError: they do not give the score of ``result.json``.
    """
    sums = sums_of(result.benchmark, result.protocol, result.lines)
    if not abs(sums.value - result.score) < 1e-6:
        raise DataError(
            f"{result.title} of {result.model}: result.json says {result.score:.6g}, the lines of predictions.jsonl give"
            f" {sums.value:.6g}; they are not of one run: run alignkd benchmark run again with another --out"
        )
    return sums


def sums_of(benchmark: str, protocol: str, lines: Sequence[Line]) -> Sums:
    """What a benchmark's figure is made of under a protocol.

    Raises:
        DataError: a line has a category that the benchmark does not have.
    """
    names = picture_names(benchmark, lines)
    if (known := _KNOWN.get(benchmark)) and (other := {line.category for line in lines} - set(known)):
        raise DataError(f"{benchmark}: {min(other)!r:.80} is none of its categories: {', '.join(known)}; run it again")
    if benchmark == "mmbench":
        return _circular(lines, names)
    if benchmark == "mme":
        return _pairs(lines, names)
    if benchmark == "pope":
        return _f1(lines, names, pooled=protocol == "lmms-eval")
    return _mean(lines, names)


def category_figures(result: Result) -> dict[str, float]:
    """The figure of each category by itself, by the same formula; empty where there is but one, or are very many."""
    found_in_lines = {line.category for line in result.lines if line.category and line.counted}
    categories = sorted(found_in_lines, key=lambda name: (_ORDER.get(name, len(_ORDER)), name))
    if not 2 <= len(categories) <= _MOST_CATEGORIES:
        return {}
    found = {}
    for category in categories:
        lines = [line for line in result.lines if line.category == category and line.counted]
        names = picture_names(result.benchmark, lines)
        found[category] = (
            _pairs(lines, names, (category,)).value
            if result.benchmark == "mme"
            else sums_of(result.benchmark, result.protocol, lines).value
        )
    return found


def picture_names(benchmark: str, lines: Sequence[Line]) -> list[str]:
    """The picture that each line is about; lines that only count together have one. Without a picture, the question itself."""
    own = ["\n".join(line.images) or f"question {line.id}" for line in lines]
    if benchmark != "mmbench":
        return own
    groups = [question_of(line) for line in lines]
    first: dict[str, str] = {}
    for _, group, name in sorted(zip((_index(line) for line in lines), groups, own, strict=True)):
        first.setdefault(group, name)
    return [first[group] for group in groups]


def question_of(line: Line) -> str:
    """The question of MMBench that a row is a pass of."""
    return str(_index(line) % _A_PASS)


def _index(line: Line) -> int:
    try:
        return int(line.id)
    except ValueError as error:
        raise DataError(f"MMBench: id {line.id!r:.80} is no whole number; run the benchmark again") from error


def _table(names: Sequence[str], parts_LK: Floats) -> tuple[tuple[str, ...], Floats]:
    pictures, where = np.unique(np.array(names, dtype=object), return_inverse=True)
    sums_PK = np.zeros((len(pictures), parts_LK.shape[1]))
    np.add.at(sums_PK, where, parts_LK)
    return tuple(pictures.tolist()), sums_PK


def _share(sums: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(100 * sums[..., 0] / sums[..., 1])


def _mean(lines: Sequence[Line], names: Sequence[str]) -> Sums:
    parts = np.array([(line.score * line.counted, float(line.counted)) for line in lines])
    pictures, sums = _table(names, parts)
    sums, pictures = sums[sums[:, 1] > 0], tuple(np.array(pictures, dtype=object)[sums[:, 1] > 0].tolist())
    whole = sums[:, 1].max(initial=0) <= 1 and bool(np.isin(sums[:, 0], (0, 1)).all())
    independent = (int(sums[:, 0].sum()), len(sums)) if whole else None
    return Sums(pictures, np.zeros(len(pictures), dtype=np.int64), sums, _share, independent)


def _circular(lines: Sequence[Line], names: Sequence[str]) -> Sums:
    right: dict[str, bool] = {}
    picture: dict[str, str] = {}
    for line, name in zip(lines, names, strict=True):
        group = question_of(line)
        right[group] = right.get(group, True) and line.score == 1
        picture[group] = name
    pictures, sums = _table(list(picture.values()), np.array([(float(right[group]), 1.0) for group in picture]))
    return Sums(pictures, np.zeros(len(pictures), dtype=np.int64), sums, _share)


def _f1(lines: Sequence[Line], names: Sequence[str], *, pooled: bool) -> Sums:
    categories = [""] if pooled else sorted({line.category for line in lines})
    parts = np.zeros((len(lines), 3 * len(categories)))
    kinds = {("yes", "yes"): 0, ("yes", "no"): 1, ("no", "yes"): 2}
    for number, line in enumerate(lines):
        kind = kinds.get((line.parsed, line.answers[0] if line.answers else ""))
        if kind is not None:
            parts[number, 3 * categories.index("" if pooled else line.category) + kind] = 1
    pictures, sums = _table(names, parts)

    def figure(sums: Floats) -> Floats:
        right, wrong, missed = (sums[..., kind::3] for kind in range(3))
        return np.asarray(100 * (2 * right / np.maximum(2 * right + wrong + missed, 1)).mean(axis=-1))

    return Sums(pictures, np.zeros(len(pictures), dtype=np.int64), sums, figure)


def _pairs(lines: Sequence[Line], names: Sequence[str], counting: Sequence[str] = PERCEPTION) -> Sums:
    answered = [(line, name) for line, name in zip(lines, names, strict=True) if line.counted]
    right: dict[str, list[float]] = {}
    for line, name in answered:
        right.setdefault(name, []).append(line.score)
    category = {name: line.category for line, name in answered}
    known = sorted(set(category.values()))
    shown = [known.index(name) for name in counting if name in known]
    pictures = tuple(sorted(right))
    strata = np.array([known.index(category[name]) for name in pictures], dtype=np.int64)
    sums = np.zeros((len(pictures), 4 * len(known)))
    for row, name in enumerate(pictures):
        scores = right[name]
        sums[row, 4 * strata[row] : 4 * strata[row] + 4] = sum(scores), len(scores), min(scores) == 1, 1

    def figure(sums: Floats) -> Floats:
        right, asked, both, count = (sums[..., kind::4][..., shown] for kind in range(4))
        return np.asarray(100 * (right / np.maximum(asked, 1) + both / np.maximum(count, 1)).sum(axis=-1))

    return Sums(pictures, strata, sums, figure)
