"""Where the results of several models were not made alike, in words."""

from collections.abc import Iterator, Mapping
from typing import Any

from alignkd.pipeline.report.benchmarks.comparison import WILSON, Comparison
from alignkd.pipeline.report.benchmarks.out_folders import Result
from alignkd.pipeline.runtime.printable import json_text

_ABOUT_ANSWERS = ("weights_sha256",)
"""Settings in which different models differ."""
_FEW_PICTURES = 30


def warnings_of(comparison: Comparison) -> list[str]:
    """One sentence for everything that makes a comparison doubtful, with the benchmarks that it is about."""
    titles: dict[str, list[str]] = {}
    for name in comparison.benchmarks:
        for words in _about(comparison, name):
            titles.setdefault(words, []).append(comparison.title_of(name))
    return [f"{', '.join(about)}: {words}" for words, about in titles.items()]


def _about(comparison: Comparison, name: str) -> Iterator[str]:
    results = {model.name: model.results[name] for model in comparison.models if name in model.results}
    yield from _unlike(results)
    if limited := [f"{model} ({result.limit:,})" for model, result in results.items() if result.limit is not None]:
        yield f"limited to the first questions: {', '.join(limited)}; a sample stands beside no published figure"
    scores = {model: comparison.scores[model][name] for model in results}
    if few := [model for model, one in scores.items() if one.pictures < _FEW_PICTURES and one.method != WILSON]:
        yield f"fewer than {_FEW_PICTURES} pictures ({', '.join(few)}): a bootstrap interval is too narrow"
    for pair in comparison.pairs:
        for one in pair.compared:
            if one.benchmark == name and one.asked != (one.shared, one.shared):
                yield (
                    f"{pair.first} and {pair.second} are compared on {one.shared:,} questions they share; they were asked"
                    f" {one.asked[0]:,} and {one.asked[1]:,}"
                )


def _unlike(results: Mapping[str, Result]) -> Iterator[str]:
    yield from _differing("protocol", {model: result.protocol for model, result in results.items()})
    names = dict.fromkeys(name for result in results.values() for name in result.settings)
    for name in names:
        if name not in (*_ABOUT_ANSWERS, "limit"):
            yield from _differing(name, {model: result.settings.get(name) for model, result in results.items()})


def _differing(name: str, values: Mapping[str, Any]) -> Iterator[str]:
    groups: dict[str, list[str]] = {}
    for model, value in values.items():
        groups.setdefault(value_words(value), []).append(model)
    if len(groups) > 1:
        parts = "; ".join(f"{value} ({', '.join(models)})" for value, models in groups.items())
        yield f"{name.replace('_', ' ')} differs: {parts}"


def value_words(value: Any) -> str:
    """A setting's value, short."""
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json_text(value)
    return text if len(text) <= 160 else f"{text[:157]}..."
