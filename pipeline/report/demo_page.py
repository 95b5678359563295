"""The demo's page: the sections of any run for its students, and what was learned, by whom, and what it took."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alignkd.pipeline.config.demo import DemoConfig, Paths
from alignkd.pipeline.config.report import ReportConfig
from alignkd.pipeline.data.easy_vqa import EasyVqa, Question
from alignkd.pipeline.data.sample import Sample, parse_sample
from alignkd.pipeline.report.attention_grid import Column, attention_grid
from alignkd.pipeline.report.attention_maps import Prompting, look
from alignkd.pipeline.report.charts import interval_bars
from alignkd.pipeline.report.page import Html, embed, heading, joined, page, paragraph, section, small, table, write_page
from alignkd.pipeline.report.runs.reading import read_runs
from alignkd.pipeline.report.sections.cache import cache_table
from alignkd.pipeline.report.sections.overview import warnings_section
from alignkd.pipeline.report.sections.predictions import predictions_section
from alignkd.pipeline.report.sections.settings import settings_section
from alignkd.pipeline.report.sections.speed import speed_section
from alignkd.pipeline.report.sections.terms import shares_section, terms_section
from alignkd.pipeline.report.words import adding_up, percent

_ATTENTION_CAPTION = (
    "First-layer attention from the text after the image to the 16 vision tokens, averaged over heads and text rows; the"
    " share of all attention that falls on the image below each panel. The student before training is the start both"
    " students share."
)


def write_report(config: DemoConfig, paths: Paths, data: EasyVqa, figures: dict[str, Any], device: str) -> Path:
    """Write ``report.html``; returns its path."""
    folders = tuple(str(paths.student_run(arm)) for arm in config.arms)
    runs = read_runs(folders)
    predictions, _ = predictions_section(runs, ReportConfig(runs=folders, to=str(paths.out), images=str(data.root)))
    sections = [
        _head(config, figures),
        _accuracy(figures),
        terms_section(runs),
        shares_section(runs),
        warnings_section(runs)[0],
        _attention(config, paths, data, device),
        predictions,
        _cache(figures["cache"]),
        _stages(figures["stages"]),
        speed_section(runs),
        settings_section(runs)[0],
    ]
    path = paths.out / "report.html"
    write_page(path, page("alignkd demo", sections))
    return path


def _head(config: DemoConfig, figures: dict[str, Any]) -> Html:
    counts, versions = figures["data"], figures["versions"]
    learned = (
        f"A small MobileVLM-V2-shaped teacher learns from {counts['train_questions']:,} questions about"
        f" {counts['train_images']:,} images. Two students, {config.student.hidden_size} wide with"
        f" {config.student.layers} layers (the teacher: {config.teacher.hidden_size} and {config.teacher.layers}), learn"
        f" from {counts['labelled_questions']:,} questions about {config.labelled_share:.0%} of the images, from the same"
        f" start, in the same order, for {config.student_steps} steps: one by plain fine-tuning, one from the teacher's cached"
        " targets. The teacher is not loaded while they learn. All three share one frozen vision tower, which knew"
        f" {figures['tower']['colour']:.1%} of the colours and {figures['tower']['shape']:.1%} of the shapes of the test"
        " images before any language model saw it."
    )
    ran = (
        f"Seed {figures['seed']}. {versions['platform']}, {versions['device']}, torch {versions['torch']}, transformers"
        f" {versions['transformers']}, alignkd {versions['alignkd']}. One seed is one draw: see docs/experiments.md for"
        " several, with paired intervals."
    )
    return joined([heading("Align-KD on easy-VQA"), paragraph(learned), small(ran)])


def _accuracy(figures: dict[str, Any]) -> Html:
    floor = figures["question_only_floor"]
    found = dict(sorted(figures["accuracy"].items(), key=lambda item: item[0] == "teacher"))  # the teacher last
    rows = [["always answering from the question alone", percent(floor), ""]]
    for name, result in found.items():
        low, high = map(percent, result["interval_95"])
        rows.append([name, percent(result["accuracy"]), f"{low} to {high}"])
    words = (
        f"Exact match on the official test split ({figures['data']['test_questions']:,} questions), answers generated."
        " Intervals are of the test questions (Wilson); they do not cover the draw of the seed."
    )
    bars = {name: (result["accuracy"], *result["interval_95"]) for name, result in found.items()}
    chosen = [place for place, row in enumerate(rows) if row[0] == "student align-kd"]
    return section(
        "Accuracy",
        table(["", "accuracy", "95 % interval"], rows, numbers=(1,), chosen=chosen),
        small(words),
        embed(interval_bars(bars, ("question alone", floor)), "accuracy of each model in per cent, from 0, with its interval"),
    )


def _attention(config: DemoConfig, paths: Paths, data: EasyVqa, device: str) -> Html:
    models = {"teacher": paths.teacher, "student before": paths.student_start}
    models |= {f"student, {arm}": paths.student_run(arm) / "student" for arm in config.arms}
    chosen = _different_images(data.test, 5, config.seed)
    samples, prompting = [_as_sample(question) for question in chosen], Prompting(images=str(data.root), device=device)
    columns: dict[str, Column] = {name: look(folder, samples, prompting) for name, folder in models.items()}
    asked = [f"{question.text} – {question.answer}" for question in chosen]
    return section("Where the text looks", attention_grid([(asked, columns)]), small(_ATTENTION_CAPTION))


def _different_images(questions: Sequence[Question], count: int, seed: int) -> list[Question]:
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


def _cache(cache: dict[str, Any]) -> Html:
    words = (
        f"{cache['samples']:,} samples, {cache['bytes'] / 1e6:,.1f} MB on disk. The demo's vocabulary has a few hundred"
        " tokens and its answers two, so dense logits are small here; at 32,000 tokens and 100-token answers they are 6.4 MB"
        " a sample."
    )
    return section("The cache", cache_table(cache, cache["samples"]), small(words))


def _stages(stages: Sequence[dict[str, Any]]) -> Html:
    seconds, total = adding_up([stage["seconds"] for stage in stages], 1)
    rows = [
        [stage["stage"], f"{taken} s", f"{stage['peak_memory_bytes'] / 1e6:,.0f} MB"]
        for stage, taken in zip(stages, seconds, strict=True)
    ]
    minutes = sum(stage["seconds"] for stage in stages) / 60
    rows.append([f"in all ({minutes:,.1f} minutes)", f"{total} s", ""])
    return section(
        "Time and memory",
        table(["stage", "time", "peak memory so far"], rows, numbers=(1, 2), total=True),
        small("Peak memory is that of the process since its start on a CPU, and of the stage on a GPU."),
    )
