"""What each run is and how it ended, and the warnings of each."""

from collections.abc import Sequence
from typing import Any

from alignkd.pipeline.report.page import Html, Text, joined, missing, paragraph, section, small, table
from alignkd.pipeline.report.runs.run import Run, number
from alignkd.pipeline.report.words import duration, figure, short

_MOST_WARNINGS = 100


def overview(runs: Sequence[Run]) -> Html:
    """A table with a column for each run, and what is unusual about reading it."""
    columns = [_facts(run) for run in runs]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    torn = [run.name for run in runs if run.torn]
    notes = [
        missing(f"{name}: the last line of metrics.jsonl is cut short (being written, or cut by a kill), and is not shown")
        for name in torn
    ]
    notes += [missing(f"{run.name}: metrics.jsonl has no line yet, so there are no curves") for run in runs if not run.lines]
    heads = ["", *(run.name for run in runs)]
    return joined([table(heads, rows), *notes])


def _facts(run: Run) -> dict[str, Text]:
    settings, result, versions = run.settings, run.result or {}, run.versions
    seconds = number(result.get("seconds")) or run.last("seconds")
    steps = settings.get("steps")
    started = str(run.record.get("started", "–"))
    return {
        "state": run.state,
        "recipe": run.recipe_name + (", weights learned" if run.recipe.get("weighting") == "learned" else ""),
        "trained": "low-rank updates (LoRA) and projector" if settings.get("lora") else "all weights but the tower's",
        "targets": _targets(run),
        "student at the start": run.setting("student") or "–",
        "data": f"{run.setting('data') or '–'} ({figure(settings.get('samples'))} samples)",
        "steps": figure(run.last_step) + (f" of {steps:,}" if isinstance(steps, int) and steps != run.last_step else ""),
        "samples learned from": figure(_whole(run.last("samples"))) + _written(run),
        "loss in the last line": figure(run.last("loss")),
        "best student": _best(result.get("best")) + (", then the run ended early" if result.get("ended_early") is True else ""),
        "time": "–" if seconds is None else duration(seconds),
        "processes": figure(result.get("processes")),
        "begun": f"resumed {started}" if settings.get("resume") else started,
        "on": f"{versions.get('device', '–')}, {versions.get('platform', '–')}",
        "versions": f"alignkd {versions.get('alignkd', '–')}, torch {versions.get('torch', '–')},"
        f" transformers {versions.get('transformers', '–')}",
    }


def _written(run: Run) -> Text:
    """How many of the samples had answers that a model wrote; nothing where none had."""
    written = _whole(run.last("samples_written"))
    return f", {figure(written)} of them with written answers" if written else ""


def _best(found: Any) -> str:
    """What ``--keep-best`` kept."""
    if not isinstance(found, dict):
        return "–"
    return f"{found.get('name')} {figure(number(found.get('value')))}, at step {figure(_whole(number(found.get('step'))))}"


def _targets(run: Run) -> str:
    if teacher := run.setting("online_teacher"):
        return f"computed while it trained, by {teacher}"
    taught = (run.result or {}).get("teachers")
    counts = [one.get("samples") for one in taught if isinstance(one, dict)] if isinstance(taught, list) else []
    caches = run.texts("cache")
    if len(caches) > 1 and len(counts) == len(caches):
        shown = (figure(_whole(number(count))) for count in counts)
        caches = tuple(f"{cache} (taught {count} samples)" for cache, count in zip(caches, shown, strict=True))
    return ", ".join(caches) or "none: its recipe needs no teacher"


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def warnings_of(run: Run) -> list[str]:
    """The warnings of a run's result."""
    found = (run.result or {}).get("warnings")
    return [str(text) for text in found] if isinstance(found, list) else []


def warnings_section(runs: Sequence[Run]) -> tuple[Html, dict[str, Any]]:
    """All warnings, by run."""
    parts = list[Text]()
    for run in runs:
        before = f"{run.name}: " if len(runs) > 1 else ""
        found = warnings_of(run)
        parts += [paragraph(f"{before}{short(text, 2000)}", "warning") for text in found[:_MOST_WARNINGS]]
        if len(found) > _MOST_WARNINGS:
            parts.append(small(f"{before}{len(found) - _MOST_WARNINGS:,} more in result.json"))
        if run.result is None:
            parts.append(missing(f"{before}its warnings come into result.json when it ends; until then they are in its log"))
        elif not found:
            parts.append(small(f"{before}none"))
    return section("Warnings", *parts), {run.name: warnings_of(run) for run in runs}
