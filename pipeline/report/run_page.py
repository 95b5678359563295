"""``alignkd report``: one page about one training run, or several side by side.

1. Read the folders, which may be of runs that are not finished. 2. Draw what they logged. 3. Where models and data are still
there, run the models on a few samples. 4. Write one file; what could not be shown, and why, is on the page.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignkd.pipeline.config.report import ReportConfig
from alignkd.pipeline.hub.models import pin_models
from alignkd.pipeline.report.page import heading, page, write_page
from alignkd.pipeline.report.runs.command import command_to_repeat
from alignkd.pipeline.report.runs.reading import read_runs
from alignkd.pipeline.report.runs.run import Run
from alignkd.pipeline.report.sections.attention import attention_section
from alignkd.pipeline.report.sections.cache import cache_section
from alignkd.pipeline.report.sections.held_out import held_out_section
from alignkd.pipeline.report.sections.overview import overview, warnings_section
from alignkd.pipeline.report.sections.predictions import predictions_section
from alignkd.pipeline.report.sections.settings import settings_section
from alignkd.pipeline.report.sections.speed import optimizer_section, speed_section
from alignkd.pipeline.report.sections.terms import shares_section, terms_section
from alignkd.pipeline.runtime.files import check_out_folder
from alignkd.plugins import load_plugins


def report(config: ReportConfig) -> dict[str, Any]:
    """Write ``report.html`` into ``config.to``; returns the figures that it shows.

    Raises:
        ConfigError: the folder cannot be written.
        DataError: a folder is no training run, or a file of it is damaged.
    """
    to = Path(config.to)
    check_out_folder(to, "--to")
    runs = read_runs(config.runs)
    load_plugins(config.plugins)
    config = pin_models(config)
    warnings, warned = warnings_section(runs)
    held_out, evaluated = held_out_section(runs)
    predictions, answered = predictions_section(runs, config)
    settings, different = settings_section(runs)
    cache, sizes = cache_section(runs, config.cache)
    attention, looked = attention_section(runs, config)
    title = f"Training run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} training runs side by side"
    sections = [
        heading(title),
        overview(runs),
        warnings,
        terms_section(runs),
        shares_section(runs),
        held_out,
        speed_section(runs),
        optimizer_section(runs),
        attention,
        predictions,
        cache,
        settings,
    ]
    to.mkdir(parents=True, exist_ok=True)
    path = to / "report.html"
    write_page(path, page(title, sections))
    return {
        "report": str(path),
        "runs": [_figures(run) for run in runs],
        "warnings": warned,
        "held_out": evaluated,
        "settings_that_differ": different,
        "attention_on_image": looked,
        "predictions": answered,
        "caches": sizes,
    }


def _figures(run: Run) -> dict[str, Any]:
    figures: dict[str, Any] = {"name": run.name, "folder": str(run.folder), "state": run.state, "recipe": run.recipe_name}
    figures |= {name: run.last(name) for name in ("loss", "samples", "seconds", "samples_per_second", "peak_memory_bytes")}
    terms = {
        term: {"value": run.last(term), "weighted": run.last(f"weighted/{term}"), "share": run.last(f"share/{term}")}
        for term in run.terms
    }
    return figures | {"step": run.last_step, "terms": terms, "command": command_to_repeat(run)}


def figures_in_words(figures: dict[str, Any]) -> str:
    """What ``alignkd report`` prints for people."""
    lines = [f"{run['name']}: {run['state']}; recipe {run['recipe']}, {_loss(run['loss'])}" for run in figures["runs"]]
    counts: Sequence[list[str]] = list(figures["warnings"].values())
    lines += [f"warnings: {sum(map(len, counts))}", f"report: {figures['report']}"]
    return "\n".join(lines)


def _loss(loss: float | None) -> str:
    return "no loss logged yet" if loss is None else f"loss {loss:.4g} in the last line"
