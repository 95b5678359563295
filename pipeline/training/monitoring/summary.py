"""How a run ended: the last value of each term, the warnings that matter, where things lie and the next command."""

import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignkd.cache_store.rows.reasons import count_reasons, in_words
from alignkd.pipeline.config.distill import DistillConfig
from alignkd.pipeline.config.shared import several
from alignkd.pipeline.feeding.teacher_rows import TeacherRows
from alignkd.targets.several import teacher_name

_FOLDERS = {
    "student": "the student in Hugging Face form",
    "student-official": "the student in the layout of the official release",
    "best": "the best student so far, by --keep-best",
    "adapter": "the low-rank updates and the projector, for PEFT",
    "adapters.safetensors": "what was learned beside the student, for --adapters-of",
    "metrics.jsonl": "the log lines",
    "tensorboard": "the log lines for TensorBoard",
    "checkpoints": "the last checkpoints",
    "lengths-*.npy": "the lengths of the samples, for the next run into this folder",
    "run.json": "the settings and versions",
    "result.json": "these figures",
}
_NAMED = 3
"""Images that are named; the others are counted."""


def final_terms(line: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Each term of a log line: its ``value``, its ``weighted`` value and its ``share`` of the loss."""
    names = [name.removeprefix("share/") for name in line if name.startswith("share/")]
    return {name: {"value": line[name], "weighted": line[f"weighted/{name}"], "share": line[f"share/{name}"]} for name in names}


def taught_by(caches: Sequence[TeacherRows], totals: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Where there are several teachers: the cache of each, its weight, and how many samples it taught."""
    if len(caches) < 2:
        return {}
    names = map(teacher_name, range(len(caches)))
    return {
        "teachers": [
            {"name": name, "cache": cache.reader.url, "weight": cache.weight, "samples": int(totals[f"samples/{name}"])}
            for name, cache in zip(names, caches, strict=True)
        ]
    }


def answers_by_author(totals: Mapping[str, Any]) -> dict[str, int]:
    """How many samples with the data's own answers were learned, and with written ones; nothing without any of these."""
    found = {name: int(totals[name]) for name in ("samples_data", "samples_written")}
    return found if found["samples_written"] else {}


def rejection_warnings(count: int, reasons: Iterable[str]) -> list[str]:
    """One warning about all rejected samples, with the kinds of reasons by count and the first; none where there are none."""
    if not count:
        return []
    reasons = list(reasons)
    kinds = in_words(count_reasons(reasons))
    return [f"rejected and not learned: {count:,} samples ({kinds}); the first: {reasons[0]}. result.json names them"]


def image_warnings(references: Collection[str]) -> list[str]:
    """One warning about images that show little or nothing; none where there are none."""
    if not references:
        return []
    named = ", ".join(sorted(references)[:_NAMED]) + (", ..." if len(references) > _NAMED else "")
    return [
        f"images that show little or nothing: {len(references):,} of those that the first process read ({named}). They are used"
        " as the model's own code reads them; convert them to 8-bit RGB without transparency if that is not meant"
    ]


def folders(out: Path) -> dict[str, str]:
    """What lies in a run's folder, by name, with what it is."""
    return {name: about for name, about in _FOLDERS.items() if name == "result.json" or next(out.glob(name), None)}


def next_command(config: DistillConfig, student: Path) -> str:
    """The command that evaluates the student on the data of the run, as it can be pasted into a shell."""
    words = ["alignkd", "evaluate", "--model", str(student)]
    words += [word for data in several(config.eval_data or config.data) for word in ("--data", data)]
    words += [word for folder in several(config.eval_images or config.images) for word in ("--images", folder)]
    words += ["--out", str(Path(config.out) / "evaluation")]
    words += [word for path in config.plugins for word in ("--plugin", path)]
    return shlex.join(words)


def summary(figures: Mapping[str, Any]) -> str:
    """The figures of a run as text for people, with the warnings near the end."""
    return "\n".join(
        [*_counts(figures), *_teachers(figures), *_terms(figures), *_held_out(figures), *_warnings(figures), *_places(figures)]
    )


def _counts(figures: Mapping[str, Any]) -> list[str]:
    processes = f" on {figures['processes']:,} processes" if figures["processes"] > 1 else ""
    return [
        f"{figures['steps']:,} steps, {figures['samples']:,} samples, {figures['tokens']:,} positions"
        f" ({figures['padding_share']:.0%} padding){processes}",
        *_authors(figures),
        f"{_time(figures['seconds'])}: {figures['samples_per_second']:,.4g} samples/s, {figures['tokens_per_second']:,.0f}"
        f" positions/s; peak memory {figures['peak_memory_bytes'] / 1e9:,.2f} GB",
    ]


def _teachers(figures: Mapping[str, Any]) -> list[str]:
    return [
        f"{one['name']} taught {one['samples']:,} samples, weight {one['weight']:g}: {one['cache']}"
        for one in figures.get("teachers", ())
    ]


def _authors(figures: Mapping[str, Any]) -> list[str]:
    if not figures.get("samples_written"):
        return []
    return [f"{figures['samples_data']:,} samples with answers of the data, {figures['samples_written']:,} with written ones"]


def _terms(figures: Mapping[str, Any]) -> list[str]:
    terms = figures["terms"]
    if not terms:
        return []
    width = max(len(name) for name in ("loss", *terms))
    rows = [f"  {'loss':<{width}}  {figures['loss']:>10.4g}"]
    rows += [f"  {name:<{width}}  {term['value']:>10.4g}  {term['share']:>6.1%}" for name, term in terms.items()]
    return ["", f"  {'':<{width}}  {'at the end':>10}   share", *rows]


def _held_out(figures: Mapping[str, Any]) -> list[str]:
    found, best = figures.get("held_out") or {}, figures.get("best")
    width = max(map(len, found), default=0)
    rows = [f"  {name:<{width}}  {value:>10.4g}" for name, value in found.items()]
    rows = ["", "  evaluated at the end:", *rows] if rows else []
    if best:
        rows.append(f"  the best {best['name']}: {best['value']:.5g} at step {best['step']:,}, kept in best/")
    if figures.get("ended_early"):
        rows.append("  the run ended early: none was better for --patience evaluations")
    return rows


def _warnings(figures: Mapping[str, Any]) -> list[str]:
    warnings = figures["warnings"]
    return ["", f"warnings ({len(warnings)}):", *(f"  * {text}" for text in warnings)] if warnings else []


def _places(figures: Mapping[str, Any]) -> list[str]:
    found = figures["folders"]
    width = max(map(len, found))
    rows = [f"  {name:<{width}}  {about}" for name, about in found.items()]
    what_next = ["", "next, with the questions to evaluate on as --data:", f"  {figures['next']}"]
    return ["", f"in {figures['out']}:", *rows, *what_next]


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
