"""Figures on held-out samples and sampled benchmarks, where a run logged them."""

from collections.abc import Sequence
from typing import Any

from alignkd.pipeline.report.charts import legend
from alignkd.pipeline.report.page import Html, missing, panels, section, small, table
from alignkd.pipeline.report.runs.run import EVAL, Run
from alignkd.pipeline.report.sections.terms import curves_of
from alignkd.pipeline.report.words import figure

_MOST = 36
_COUNTS = frozenset(f"{EVAL}{name}" for name in ("samples", "answers", "rejected", "seconds"))
"""What an evaluation counted: in the table alone."""
NONE = "no run was evaluated while it trained: distill --eval-data FILE --eval-steps N does it"


def held_out_section(runs: Sequence[Run]) -> tuple[Html, dict[str, Any]]:
    """A chart for each figure with a curve for each run; first and last values in a table."""
    names = list(dict.fromkeys(name for run in runs for name in run.held_out))
    if not names:
        return section("Held-out samples", missing(NONE)), {}
    charts = [curves_of(runs, name, _title(name)) for name in names[:_MOST] if name not in _COUNTS]
    heads = ["", *(f"{run.name}: {what}" if len(runs) > 1 else what for run in runs for what in ("first", "last", "last step"))]
    rows = [[_title(name), *(cell for run in runs for cell in _cells(run, name))] for name in names[:_MOST]]
    without = [missing(f"{run.name}: not evaluated while it trained") for run in runs if not run.held_out]
    if len(names) > _MOST:
        without.append(small(f"{len(names) - _MOST} more figures are in metrics.jsonl"))
    last = table(heads, rows, numbers=range(1, len(heads)))
    figures = {run.name: {name: run.last(name) for name in run.held_out} for run in runs}
    return section(
        "Held-out samples", legend([run.name for run in runs]), panels(c for c in charts if c), last, *without
    ), figures


def _title(name: str) -> str:
    return name.removeprefix(EVAL).replace("_", " ")


def _cells(run: Run, name: str) -> list[str]:
    steps, values = run.series(name)
    return [figure(values[0]), figure(values[-1]), f"{steps[-1]:,}"] if steps else ["–", "–", "–"]
