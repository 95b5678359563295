"""The demo's page: what was learned, how the terms went, where the text looks, what it cost."""

import json
from pathlib import Path
from typing import Any

from alignkd.errors import DataError, wrap_errors
from alignkd.pipeline.config.demo import DemoConfig, Paths
from alignkd.pipeline.data.easy_vqa import EasyVqa
from alignkd.pipeline.report.attention_grid import attention_grid
from alignkd.pipeline.report.charts import accuracy_chart, loss_curves
from alignkd.pipeline.report.page import embed, figure_section, page
from alignkd.pipeline.runtime.printable import html_text

_LOSS_CAPTION = (
    "Each term unweighted, from metrics.jsonl. The supervised term is that of each run; the others exist only where a"
    " teacher is followed. Vision terms are relative to the variance of the teacher's tokens, attention to uniform attention."
)

_ATTENTION_CAPTION = (
    "First-layer attention from the text after the image to the 16 vision tokens, averaged over heads and text rows; the"
    " share of all attention that falls on the image below each name. The student before training is the start both"
    " students share."
)


def write_report(config: DemoConfig, paths: Paths, data: EasyVqa, figures: dict[str, Any], device: str) -> Path:
    """Write ``report.html``; returns its path."""
    runs = {arm: _read_metrics(paths.student_run(arm) / "metrics.jsonl") for arm in config.arms}
    models = {"teacher": paths.teacher, "student before": paths.student_start}
    models |= {f"student, {arm}": paths.student_run(arm) / "student" for arm in config.arms}
    attention = attention_grid(models, data, seed=config.seed, device=device)
    sections = [
        _head(config, figures),
        _accuracy(figures),
        figure_section("Loss, term by term", loss_curves(runs), _LOSS_CAPTION),
        figure_section("Where the text looks", attention, _ATTENTION_CAPTION),
        _cache(figures),
        _stages(figures),
    ]
    path = paths.out / "report.html"
    path.write_text(page("alignkd demo", sections), encoding="utf-8", errors="xmlcharrefreplace")
    return path


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    with wrap_errors(DataError, f"{path} is damaged; run the demo again with another --out", ValueError):
        return [json.loads(line) for line in path.read_text().splitlines()]


def _head(config: DemoConfig, figures: dict[str, Any]) -> str:
    counts, versions = figures["data"], figures["versions"]
    return (
        "<h1>Align-KD on easy-VQA</h1>"
        f"<p>A small MobileVLM-V2-shaped teacher learns from {counts['train_questions']:,} questions about"
        f" {counts['train_images']:,} images. Two students, {config.student.hidden_size} wide with"
        f" {config.student.layers} layers (the teacher: {config.teacher.hidden_size} and {config.teacher.layers}), learn"
        f" from {counts['labelled_questions']:,}"
        f" questions about {config.labelled_share:.0%} of the images, from the same start, in the same order, for"
        f" {config.student_steps} steps: one by plain fine-tuning, one from the teacher's cached targets. The teacher is"
        " not loaded while they learn. All three share one frozen vision tower, which knew"
        f" {figures['tower']['colour']:.1%} of the colours and {figures['tower']['shape']:.1%} of the shapes of the test"
        " images before any language model saw it.</p>"
        f"<p class='small'>Seed {figures['seed']}. {html_text(versions['platform'])}, {html_text(versions['device'])},"
        f" torch {html_text(versions['torch'])}, transformers {html_text(versions['transformers'])}, alignkd"
        f" {html_text(versions['alignkd'])}."
        " One seed is one draw: see docs/experiments.md for several, with paired intervals.</p>"
    )


def _accuracy(figures: dict[str, Any]) -> str:
    floor = f"{figures['question_only_floor']:.1%}"
    rows = [f"<tr><td>always answering from the question alone</td><td class='number'>{floor}</td><td></td></tr>"]
    for name, result in sorted(figures["accuracy"].items(), key=lambda item: item[0] == "teacher"):
        low, high = result["interval_95"]
        chosen = " class='chosen'" if name == "student align-kd" else ""
        rows.append(
            f"<tr{chosen}><td>{html_text(name)}</td><td class='number'>{result['accuracy']:.1%}</td>"
            f"<td>95 % interval {low:.1%} to {high:.1%}</td></tr>"
        )
    table = f"<table>{''.join(rows)}</table>"
    words = (
        f"Exact match on the official test split ({figures['data']['test_questions']:,} questions), answers generated."
        " Intervals are of the test questions (Wilson); they do not cover the draw of the seed."
    )
    return f"<h2>Accuracy</h2>{table}<p class='small'>{words}</p>{embed(accuracy_chart(figures), 'accuracy')}"


def _cache(figures: dict[str, Any]) -> str:
    cache = figures["cache"]
    stored, dense = cache["bytes_by_field"], cache["dense_bytes_by_field"]
    others = ("attention", "vision_tokens", "input_ids", "labels")
    groups = {
        "attention": (stored.get("attention", 0), dense["attention"]),
        "vision tokens": (stored.get("vision_tokens", 0), dense["vision_tokens"]),
        "logits": (sum(size for name, size in stored.items() if name not in others), dense["logits"]),
        "ids and labels": (stored["input_ids"] + stored["labels"], 0),
    }
    samples = cache["samples"]
    rows = "".join(
        f"<tr><td>{name}</td><td class='number'>{kept / samples / 1000:,.2f} kB</td>"
        f"<td class='number'>{full / samples / 1000:,.2f} kB</td></tr>"
        for name, (kept, full) in groups.items()
    )
    total, full = cache["bytes"] / samples / 1000, sum(f for _, f in groups.values()) / samples / 1000
    return (
        "<h2>The cache</h2><table><tr><th>bytes a sample</th><th>stored</th><th>dense, 16 bits</th></tr>"
        f"{rows}<tr><td>in all</td><td class='number'>{total:,.2f} kB</td><td class='number'>{full:,.2f} kB</td></tr></table>"
        f"<p class='small'>{samples:,} samples, {cache['bytes'] / 1e6:,.1f} MB on disk. The demo's vocabulary has a few hundred"
        " tokens and its answers two, so dense logits are small here; at 32,000 tokens and 100-token answers they are 6.4 MB"
        " a sample.</p>"
    )


def _stages(figures: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html_text(s['stage'])}</td><td class='number'>{s['seconds']:,.1f} s</td>"
        f"<td class='number'>{s['peak_memory_bytes'] / 1e6:,.0f} MB</td></tr>"
        for s in figures["stages"]
    )
    total = sum(s["seconds"] for s in figures["stages"])
    return (
        "<h2>Time and memory</h2><table><tr><th>stage</th><th>time</th><th>peak memory so far</th></tr>"
        f"{rows}<tr><td>in all</td><td class='number'>{total / 60:,.1f} min</td><td></td></tr></table>"
        "<p class='small'>Peak memory is that of the process since its start on a CPU, and of the stage on a GPU.</p>"
    )
