"""The figures of a comparison as one object, and in words."""

from collections.abc import Sequence
from typing import Any

from alignkd.pipeline.evaluate.statistics import Difference
from alignkd.pipeline.report.benchmarks.comparison import Average, Compared, Comparison, Pair, Scored
from alignkd.pipeline.report.benchmarks.differing import Differing
from alignkd.pipeline.report.benchmarks.formulas import category_figures
from alignkd.pipeline.report.benchmarks.out_folders import Model, Result


def figures_of(comparison: Comparison, differing: Sequence[Differing], warnings: Sequence[str]) -> dict[str, Any]:
    """What ``--json`` prints of a comparison."""
    return {
        "models": [_model(comparison, model) for model in comparison.models],
        "pairs": [_pair(pair, [one for one in differing if _names(one) == _names(pair)]) for pair in comparison.pairs],
        "warnings": list(warnings),
        "resamples": comparison.resamples,
        "seed": comparison.seed,
    }


def score_words(value: float, unit: str) -> str:
    """A score with one digit after the point, as papers print it."""
    return f"{value:,.1f}" if unit == "percent" else f"{value:,.1f} points"


def signed_words(value: float) -> str:
    """A difference with one digit after the point and its sign; none where that digit is zero."""
    words = f"{value:+,.1f}"
    return "0.0" if words in ("-0.0", "+0.0") else words


def interval_words(interval: tuple[float, float] | None) -> str:
    """An interval's ends, with one digit after the point."""
    return "no interval" if interval is None else f"{interval[0]:,.1f} to {interval[1]:,.1f}"


def p_words(p: float, resamples: int) -> str:
    """A p-value; the least that so many resamples can show as a bound."""
    least = 2 / (resamples + 1)
    return f"≤ {least:.2g}" if p <= least else f"{p:.3f}" if p >= 0.0995 else f"{p:.2g}"


def _names(one: Pair | Differing) -> tuple[str, str]:
    return one.first, one.second


def _model(comparison: Comparison, model: Model) -> dict[str, Any]:
    scores = comparison.scores[model.name]
    average = comparison.averages[model.name]
    return {
        "name": model.name,
        "out": str(model.out),
        "model": next(iter(model.results.values())).model,
        "benchmarks": {name: _score(result, scores[name]) for name, result in model.results.items()},
        "average": _average(average),
    }


def _score(result: Result, scored: Scored) -> dict[str, Any]:
    return {
        **{"title": result.title, "score": scored.value, "unit": scored.unit},
        **{"interval_95": _ends(scored.interval), "method": scored.method, "pictures": scored.pictures},
        **{"questions": len(result.lines), "counted": sum(line.counted for line in result.lines), "limit": result.limit},
        **{"protocol": result.protocol, "settings": dict(result.settings), "notes": list(result.notes)},
        "categories": category_figures(result),
    }


def _average(average: Average) -> dict[str, Any]:
    return {"value": average.value, "interval_95": _ends(average.interval), "why_none": average.reason or None}


def _pair(pair: Pair, differing: Sequence[Differing]) -> dict[str, Any]:
    counts = {one.benchmark: one.counts for one in differing}
    return {
        **{"first": pair.first, "second": pair.second},
        "benchmarks": {one.benchmark: _compared(one, counts[one.benchmark]) for one in pair.compared},
        "left_out": dict(pair.left_out),
        "average": _difference(pair.average) if pair.average else None,
    }


def _compared(one: Compared, counts: tuple[int, int]) -> dict[str, Any]:
    return {
        **{"first": one.first, "second": one.second, **_difference(one.difference), "questions": one.counted},
        **{"first_better": counts[0], "second_better": counts[1]},
    }


def _difference(difference: Difference) -> dict[str, Any]:
    return {"difference": difference.value, "interval_95": _ends(difference.interval), "p": difference.p}


def _ends(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)
