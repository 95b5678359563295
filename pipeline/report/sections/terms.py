"""The loss term by term, each term's share of it, and the precisions that learned weights came to."""

import math
from collections.abc import Sequence
from typing import Any

from alignkd.losses.recipes import TERMS
from alignkd.pipeline.report.charts import Curve, Panel, curves, legend, shares
from alignkd.pipeline.report.page import Html, heading, joined, missing, panels, section, small, table
from alignkd.pipeline.report.runs.run import Run
from alignkd.pipeline.report.words import adding_up, figure

CAPTION = (
    "The loss is the weighted sum; each term is shown without its weight. Values are means over the steps between two log"
    " lines. Vision terms are relative to the variance of the teacher's tokens and attention to uniform attention, where the"
    " recipe normalises."
)
_MOST_TERMS = 24


def curves_of(runs: Sequence[Run], name: str, title: str = "", **about: Any) -> Html | None:
    """A chart of one figure of all runs that have it; None where none has."""
    found = [Curve(run.name, *run.series(name), place) for place, run in enumerate(runs) if run.series(name)[0]]
    return curves(Panel(title or name.replace("_", " "), found, **about)) if found else None


def terms_section(runs: Sequence[Run], title: str = "Loss, term by term") -> Html:
    """A chart of the loss, and one for each term with a curve for each run."""
    if not any(run.lines for run in runs):
        return section(title, missing("no log line is written yet"))
    names = _terms(runs)
    charts = [curves_of(runs, name) for name in ("loss", *names[:_MOST_TERMS])]
    more = [small(f"{len(names) - _MOST_TERMS} more terms are in metrics.jsonl")] if len(names) > _MOST_TERMS else []
    return section(title, legend([run.name for run in runs]), panels(c for c in charts if c), small(CAPTION), *more)


def _terms(runs: Sequence[Run]) -> list[str]:
    """The terms of all runs, those of the package first."""
    names = [term for term in TERMS if any(term in run.terms for run in runs)]
    return names + sorted({term for run in runs for term in run.terms} - set(names))


def shares_section(runs: Sequence[Run]) -> Html:
    """What part of the loss each term is: over the steps for each run, and at the end in a table that adds up."""
    charts, parts = [], list[Html]()
    places = {name: place for place, name in enumerate(_terms(runs))}
    for run in runs:
        terms = {name: run.series(f"share/{name}") for name in run.terms}
        full = {name: found for name, found in terms.items() if found[0]}
        if len(full) < 2:
            why = "its loss has one term" if full else "no share of a term is logged"
            parts.append(missing(f"{run.name}: {why}, so there are no shares to draw"))
            continue
        steps = sorted(set.union(*(set(found[0]) for found in full.values())))
        by_step = {name: dict(zip(*found, strict=True)) for name, found in full.items()}
        values = {name: [at.get(step, 0.0) for step in steps] for name, at in by_step.items()}
        charts.append(shares(run.name, steps, values, places))
    tables = [_last_values(run, named=len(runs) > 1) for run in runs if run.terms]
    caption = (
        "A term's share is its weighted value over the weighted sum. Learned weights: the weighted value includes the"
        " precision. Below 1 % or above 90 % a term or the others have almost no effect."
    )
    colours = [legend([name.replace("_", " ") for name in places], lines=False), panels(charts)] if charts else []
    return section("Shares of the terms", *colours, small(caption), *parts, *tables, _precisions(runs))


def _last_values(run: Run, *, named: bool) -> Html:
    values = {name: (run.last(name), run.last(f"weighted/{name}"), run.last(f"share/{name}")) for name in run.terms}
    weighted = [value[1] or 0.0 for value in values.values()]
    total = math.fsum(weighted)
    printed, whole = adding_up([100 * part / total if total else 0.0 for part in weighted], 1)
    digits = 4 if total < 100 else 2
    each, sum_words = adding_up(weighted, digits)
    rows = [
        [name, figure(value[0]), words, f"{share} %"]
        for (name, value), words, share in zip(values.items(), each, printed, strict=True)
    ]
    rows.append(["in all", "", sum_words, f"{whole} %" if total else "–"])
    heads = [f"{run.name}: last values" if named else "last values", "alone", "weighted", "share"]
    return table(heads, rows, numbers=(1, 2, 3), total=True)


def _precisions(runs: Sequence[Run]) -> Html:
    names = sorted({name for run in runs for name in run.names if name.startswith("precision/")})
    charts = [curves_of(runs, name, f"learned precision: {name.removeprefix('precision/')}") for name in names[:_MOST_TERMS]]
    found = [chart for chart in charts if chart]
    if not found:
        return Html()
    words = small("A learned precision multiplies the weight that the recipe gives; it starts at 1.")
    return joined([heading("Learned weights", 3), panels(found), words])
