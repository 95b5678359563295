"""Throughput, waiting, memory, and how the optimizer went, over the steps."""

from collections.abc import Sequence
from dataclasses import replace

from alignkd.pipeline.report.charts import Curve, Panel, curves, legend
from alignkd.pipeline.report.page import Html, missing, panels, section, small
from alignkd.pipeline.report.runs.run import Run

_FIGURES = (
    ("samples_per_second", "samples a second", 1.0, ""),
    ("tokens_per_second", "positions a second", 1.0, "padding included"),
    ("peak_memory_bytes", "peak memory", 1e-9, "GB, first process, since its start"),
    ("padding_share", "padding", 100.0, "% of the positions"),
    ("data_wait_share", "waiting for data", 100.0, "% of the time"),
    ("seconds", "time spent training", 1 / 60, "minutes"),
)
_OPTIMIZER = (("learning_rate", "learning rate", 1.0, ""), ("grad_norm", "gradient norm", 1.0, ""))
_CAPTION = (
    "Rates are those since the line before. Memory is the most that was taken so far: of the GPU, or of the process without"
    " one. Time does not count the time between a stop and a resume."
)


def speed_section(runs: Sequence[Run]) -> Html:
    """Charts of what a run cost."""
    return _charts(runs, "Throughput and memory", _FIGURES, _CAPTION, zero=True)


def optimizer_section(runs: Sequence[Run]) -> Html:
    """Learning rate and gradient norm."""
    return _charts(runs, "Learning rate and gradient", _OPTIMIZER, "Of the last step before each line.", zero=False)


def _charts(runs: Sequence[Run], title: str, shown: Sequence[tuple[str, str, float, str]], caption: str, *, zero: bool) -> Html:
    charts = []
    for name, words, factor, unit in shown:
        found = [Curve(run.name, *run.series(name), place) for place, run in enumerate(runs) if run.series(name)[0]]
        if found:
            scaled = [replace(curve, values=[factor * value for value in curve.values]) for curve in found]
            charts.append(curves(Panel(words, scaled, unit, zero=zero or name == "learning_rate")))
    if not charts:
        return section(title, missing("no log line is written yet"))
    return section(title, legend([run.name for run in runs]), panels(charts), small(caption))
