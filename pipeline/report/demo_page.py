"""One self-contained HTML page: what was learned, how the terms went, where the text looks, what it cost."""

import base64
import html
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alignkd.capture.attention import enable_capture
from alignkd.inputs.regions import region
from alignkd.losses.recipes import TERMS
from alignkd.models.encoders.images import to_display
from alignkd.models.families.mobilevlm import MobileVlmFamily
from alignkd.models.loading import load_vlm
from alignkd.pipeline.config.shared import DEFAULT_MAX_LENGTH
from alignkd.pipeline.data.easy_vqa import EasyVqa, Question
from alignkd.pipeline.data.preparer import Preparer
from alignkd.pipeline.data.sample import Sample, parse_sample
from alignkd.pipeline.evaluate.show_sample import captured_arrays
from alignkd.pipeline.figures.attention import Figure, image_heat, overlay, plt

if TYPE_CHECKING:
    from alignkd.pipeline.config.demo import DemoConfig, Paths

_COLOURS = {"sft": "#8c8c8c", "align-kd": "#d1495b", "teacher": "#2e4057", "floor": "#c9c9c9"}

_STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2.4rem; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { padding: .3rem .9rem .3rem 0; text-align: left;
border-bottom: 1px solid #ddd; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; } p.small { color: #666; font-size: .9rem; } tr.chosen { font-weight: 600; }
"""


def write_report(config: "DemoConfig", paths: "Paths", data: EasyVqa, figures: dict[str, Any], device: str) -> Path:
    """Write ``report.html``; returns its path."""
    sections = [
        _head(config, figures),
        _accuracy(figures),
        _picture("Loss, term by term", loss_curves(config, paths), _LOSS_WORDS),
        _picture("Where the text looks", attention_pictures(config, paths, data, device), _ATTENTION_WORDS),
        _cache(figures),
        _stages(figures),
    ]
    path = paths.out / "report.html"
    path.write_text(
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>alignkd demo</title><style>{_STYLE}</style>"
        f"<body>{''.join(sections)}</body></html>\n"
    )
    return path


def _head(config: "DemoConfig", figures: dict[str, Any]) -> str:
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
        f"<p class='small'>Seed {figures['seed']}. {html.escape(versions['platform'])}, {html.escape(versions['device'])},"
        f" torch {versions['torch']}, transformers {versions['transformers']}, alignkd {versions['alignkd']}."
        " One seed is one draw: see docs/experiments.md for several, with paired intervals.</p>"
    )


def _accuracy(figures: dict[str, Any]) -> str:
    floor = f"{figures['question_only_floor']:.1%}"
    rows = [f"<tr><td>always answering from the question alone</td><td class='number'>{floor}</td><td></td></tr>"]
    for name, result in sorted(figures["accuracy"].items(), key=lambda item: item[0] == "teacher"):
        low, high = result["interval_95"]
        chosen = " class='chosen'" if name == "student align-kd" else ""
        rows.append(
            f"<tr{chosen}><td>{html.escape(name)}</td><td class='number'>{result['accuracy']:.1%}</td>"
            f"<td>95 % interval {low:.1%} to {high:.1%}</td></tr>"
        )
    table = f"<table>{''.join(rows)}</table>"
    words = (
        f"Exact match on the official test split ({figures['data']['test_questions']:,} questions), answers generated."
        " Intervals are of the test questions (Wilson); they do not cover the draw of the seed."
    )
    return f"<h2>Accuracy</h2>{table}<p class='small'>{words}</p>{_embed(accuracy_chart(figures), 'accuracy')}"


def accuracy_chart(figures: dict[str, Any]) -> Figure:
    """Bars with intervals, the floor as a line."""
    names = sorted(figures["accuracy"], key=lambda name: name == "teacher")
    values = np.array([figures["accuracy"][name]["accuracy"] for name in names]) * 100
    ends = np.array([figures["accuracy"][name]["interval_95"] for name in names]).T * 100
    figure, axes = plt.subplots(figsize=(7, 2.6))
    colours = [_COLOURS.get(name.removeprefix("student "), "#66a182") for name in names]
    axes.barh(names, values, xerr=np.abs(ends - values), color=colours, height=0.6, capsize=3)
    axes.axvline(figures["question_only_floor"] * 100, color="#555", linestyle=":", label="question alone")
    for row, (value, end) in enumerate(zip(values, ends[1], strict=True)):
        axes.text(end + 0.6, row, f"{value:.1f}", va="center", fontsize=9)
    axes.set_xlim(50, 104)
    axes.set_xlabel("accuracy, %")
    axes.legend(loc="lower right", fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


_LOSS_WORDS = (
    "Each term unweighted, from metrics.jsonl. The supervised term is that of each run; the others exist only where a"
    " teacher is followed. Vision terms are relative to the variance of the teacher's tokens, attention to uniform attention."
)


def loss_curves(config: "DemoConfig", paths: "Paths") -> Figure:
    """One panel a term, one line a run."""
    runs = {arm: _read_metrics(paths.student_run(arm) / "metrics.jsonl") for arm in config.arms}
    shown = [term for term in TERMS if any(term in lines[0] for lines in runs.values())]
    figure, axes = plt.subplots(1, len(shown), figsize=(2.6 * len(shown), 2.5), squeeze=False)
    for axis, term in zip(axes[0], shown, strict=True):
        for arm, lines in runs.items():
            if term in lines[0]:
                steps, values = [line["step"] for line in lines], [line[term] for line in lines]
                axis.plot(steps, values, color=_COLOURS.get(arm, "#66a182"), label=arm, linewidth=1.3)
        axis.set_title(term.replace("_", " "), fontsize=9)
        axis.set_yscale("log")
        axis.tick_params(which="both", labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(fontsize=8, frameon=False)
    figure.supxlabel("step", fontsize=8)
    figure.tight_layout()
    return figure


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


_ATTENTION_WORDS = (
    "First-layer attention from the text after the image to the 16 vision tokens, averaged over heads and text rows; the"
    " share of all attention that falls on the image below each name. The student before training is the start both"
    " students share."
)


def attention_pictures(config: "DemoConfig", paths: "Paths", data: EasyVqa, device: str, count: int = 5) -> Figure:
    """Test images in rows; teacher, student before, and each trained student in columns."""
    chosen = _different_images(data.test, count, config.seed)
    models = {"teacher": paths.teacher, "student before": paths.student_start}
    models |= {f"student, {arm}": paths.student_run(arm) / "student" for arm in config.arms}
    figure, axes = plt.subplots(count, 1 + len(models), figsize=(2.0 * (1 + len(models)), 2.25 * count), squeeze=False)
    for column, (name, folder) in enumerate(models.items(), start=1):
        vlm = load_vlm(folder, device=device)
        assert isinstance(vlm, MobileVlmFamily)
        enable_capture(vlm)
        preparer = Preparer.of(vlm, template=vlm.default_template, max_length=DEFAULT_MAX_LENGTH, image_root=data.root)
        for row, question in enumerate(chosen):
            prepared = preparer(_as_sample(question))
            arrays = captured_arrays(vlm, prepared)
            picture = to_display(prepared.input.images[0], vlm.images)
            heat = image_heat(arrays["attention_HTV"], region(0, vlm.vision_grid)[None], 0)
            share = arrays["attention_HTV"].sum(axis=2).mean()
            overlay(axes[row, column], picture, heat, f"{name}\n{share:.0%} on the image")
            axes[row, 0].imshow(picture)
            axes[row, 0].axis("off")
            axes[row, 0].set_title(f"{question.text}\n{question.answer}", fontsize=7)
    figure.tight_layout()
    return figure


def _different_images(questions: list[Question], count: int, seed: int) -> list[Question]:
    order = np.random.default_rng(seed).permutation(len(questions))
    chosen: dict[str, Question] = {}
    for index in order.tolist():
        question = questions[index]
        if question.text.startswith("what") and question.answer not in {q.answer for q in chosen.values()}:
            chosen.setdefault(question.image, question)
        if len(chosen) == count:
            break
    return list(chosen.values())


def _as_sample(question: Question) -> Sample:
    turns = [{"from": "human", "value": f"<image>\n{question.text}"}, {"from": "gpt", "value": question.answer}]
    return parse_sample({"id": question.id, "image": question.image, "conversations": turns}, question.id)


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
        f"<tr><td>{html.escape(s['stage'])}</td><td class='number'>{s['seconds']:,.1f} s</td>"
        f"<td class='number'>{s['peak_memory_bytes'] / 1e6:,.0f} MB</td></tr>"
        for s in figures["stages"]
    )
    total = sum(s["seconds"] for s in figures["stages"])
    return (
        "<h2>Time and memory</h2><table><tr><th>stage</th><th>time</th><th>peak memory so far</th></tr>"
        f"{rows}<tr><td>in all</td><td class='number'>{total / 60:,.1f} min</td><td></td></tr></table>"
        "<p class='small'>Peak memory is that of the process since its start on a CPU, and of the stage on a GPU.</p>"
    )


def _picture(title: str, figure: Figure, words: str) -> str:
    return f"<h2>{title}</h2>{_embed(figure, title)}<p class='small'>{words}</p>"


def _embed(figure: Figure, alt: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    plt.close(figure)
    return f"<img alt='{html.escape(alt)}' src='data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"
