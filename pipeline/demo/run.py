"""The demo, stage by stage.

1. easy-VQA to LLaVA-format files. 2. A vision tower trained on colour and shape. 3. A teacher fine-tuned on all training
questions. 4. ``cache-teacher`` over the questions of a few labelled images. 5. Two students from the same start, seed,
questions and steps: plain fine-tuning, and Align-KD from the cache. 6. Accuracy of all on the official test split, by
generation. 7. One HTML report.
"""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from alignkd.errors import ConfigError
from alignkd.extras import require
from alignkd.losses.recipes import Recipe, get_recipe
from alignkd.pipeline.config.cache_teacher import CacheTeacherConfig
from alignkd.pipeline.config.demo import DemoConfig, Paths
from alignkd.pipeline.config.distill import DistillConfig
from alignkd.pipeline.config.evaluate import EvaluateConfig
from alignkd.pipeline.data.easy_vqa import (
    EasyVqa,
    concept_labels,
    few_labelled,
    load_easy_vqa,
    question_only_floor,
    statistics,
    write_llava,
)
from alignkd.pipeline.demo.checkpoints import new_checkpoint, train_tokenizer
from alignkd.pipeline.demo.tower import train_tower
from alignkd.pipeline.evaluate.runner import evaluate
from alignkd.pipeline.report.demo_page import write_report
from alignkd.pipeline.runtime.devices import device_words, peak_memory_bytes, pick_device
from alignkd.pipeline.runtime.files import check_out_folder, replace_text
from alignkd.pipeline.runtime.logs import log_start
from alignkd.pipeline.runtime.out_folder.lock import held
from alignkd.pipeline.runtime.run_record import collect_versions, write_run_record
from alignkd.pipeline.stage_one.worker import cache_teacher
from alignkd.pipeline.training.run import distill

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DemoResult:
    """Figures for machines, the table for people."""

    figures: dict[str, Any]
    text: str


@dataclass
class _Stages:
    """Time and peak memory of each stage."""

    taken: list[dict[str, Any]] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Log the name of a stage, then measure its time and memory."""
        _log.info("%s", name)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self.taken.append({"stage": name, "seconds": round(seconds, 1), "peak_memory_bytes": peak_memory_bytes()})


def demo(config: DemoConfig) -> DemoResult:
    """Run everything and write the report.

    Raises:
        ConfigError: easy-vqa is not installed, or ``out`` already holds a demo or is in use.
    """
    require("easy_vqa", "alignkd demo")
    paths = Paths(Path(config.out))
    check_out_folder(paths.out)
    if (paths.out / "result.json").exists() or paths.teacher_run.exists():
        raise ConfigError(f"--out {config.out} already holds a demo; choose another folder, or remove it")
    with held(paths.out):
        return _demo(config, paths)


def _demo(config: DemoConfig, paths: Paths) -> DemoResult:
    device = pick_device(config.device)
    write_run_record(paths.out / "run.json", "demo", asdict(config))
    log_start("demo", device=device_words(device), plan=f"{len(config.arms)} students, seed {config.seed}", out=config.out)
    stages = _Stages()
    with stages.stage("data: easy-VQA"):
        data = prepare_data(config, paths)
    with stages.stage("vision tower: colour and shape"):
        tower_accuracy = prepare_models(config, paths, data, device)
    with stages.stage("teacher: fine-tuned on all training questions"):
        train_teacher(config, paths, data, device)
    with stages.stage("stage one: cache the teacher's targets"):
        cache = run_cache(config, paths, data, device)
    for arm in config.arms:
        with stages.stage(f"stage two: student, {arm}"):
            train_student(config, paths, data, device, get_recipe(arm, {"focus_k": str(config.focus_k)}))
    accuracies = {}
    with stages.stage("accuracy on the test split"):
        models = {"teacher": paths.teacher} | {f"student {arm}": paths.student_run(arm) / "student" for arm in config.arms}
        for name, folder in models.items():
            accuracies[name] = test_accuracy(folder, paths, data, device)
    figures: dict[str, Any] = {
        "seed": config.seed,
        "data": statistics(data) | {"labelled_questions": cache["samples"]},
        "question_only_floor": question_only_floor(data.train, data.test),
        "tower": tower_accuracy,
        "accuracy": accuracies,
        "cache": {k: cache[k] for k in ("bytes", "samples", "bytes_by_field", "dense_bytes_by_field", "samples_per_second")},
        "stages": stages.taken,
        "versions": collect_versions(),
    }
    report = write_report(config, paths, data, figures, device)
    figures["report"] = str(report)
    replace_text(paths.out / "result.json", json.dumps(figures, indent=2) + "\n")
    return DemoResult(figures, summary(figures))


def prepare_data(config: DemoConfig, paths: Paths) -> EasyVqa:
    """Write the LLaVA-format files: all training questions, those of the few labelled images, the test questions."""
    data = load_easy_vqa()
    paths.data.mkdir(parents=True, exist_ok=True)
    write_llava(data.train, paths.data / "train.json")
    write_llava(few_labelled(data.train, config.labelled_share, config.seed), paths.data / "labelled.json")
    write_llava(data.test, paths.data / "test.json")
    return data


def prepare_models(config: DemoConfig, paths: Paths, data: EasyVqa, device: str) -> dict[str, float]:
    """Train the tower, and write an untrained teacher and student around it. Returns the tower's test accuracy."""
    set_seed(config.seed)
    labels, held_out = concept_labels(data.train), concept_labels(data.test)
    tower, accuracy = train_tower(data.root, labels, held_out, config.tower, device)
    tower = tower.cpu()
    train_tokenizer(data.train, paths.tokenizer)
    new_checkpoint(paths.tokenizer, tower, config.teacher, paths.teacher_start)
    new_checkpoint(paths.tokenizer, tower, config.student, paths.student_start)
    return accuracy


def train_teacher(config: DemoConfig, paths: Paths, data: EasyVqa, device: str) -> None:
    """Plain fine-tuning on every training question."""
    distill(
        DistillConfig(
            student=str(paths.teacher_start),
            data=str(paths.data / "train.json"),
            images=str(data.root),
            out=str(paths.teacher_run),
            recipe=get_recipe("sft"),
            max_steps=config.teacher_steps,
            learning_rate=config.teacher_learning_rate,
            optimizer="muon",
            **_shared(config, device),
        )
    )


def run_cache(config: DemoConfig, paths: Paths, data: EasyVqa, device: str) -> dict[str, Any]:
    """Stage one over the questions of the few labelled images."""
    return cache_teacher(
        CacheTeacherConfig(
            teacher=str(paths.teacher),
            data=str(paths.data / "labelled.json"),
            images=str(data.root),
            cache=str(paths.cache),
            settings=config.targets,
            shard_format=config.shard_format,
            shard_samples=256,
            device=device,
        )
    )


def train_student(
    config: DemoConfig, paths: Paths, data: EasyVqa, device: str, recipe: Recipe, name: str | None = None
) -> None:
    """Stage two with one recipe; every recipe has the same start and seed."""
    distill(
        DistillConfig(
            student=str(paths.student_start),
            data=str(paths.data / "labelled.json"),
            images=str(data.root),
            out=str(paths.student_run(name or recipe.name)),
            recipe=recipe,
            cache=str(paths.cache) if recipe.needs or recipe.projector == "teacher" else None,
            max_steps=config.student_steps,
            learning_rate=config.student_learning_rate,
            **_shared(config, device),
        )
    )


def _shared(config: DemoConfig, device: str) -> dict[str, Any]:
    return {
        "batch_size": config.batch_size,
        "group_by_length": config.group_by_length,
        "seed": config.seed,
        "device": device,
        "workers": 0,
        "save_steps": 10_000,
        "cache_tower_features": True,
    }


def test_accuracy(folder: Path, paths: Paths, data: EasyVqa, device: str) -> dict[str, Any]:
    """Exact-match accuracy on the official test split, by generation."""
    result = evaluate(
        EvaluateConfig(
            model=str(folder),
            data=str(paths.data / "test.json"),
            images=str(data.root),
            out=str(folder.parent / "test"),
            batch_size=512,
            max_new_tokens=5,
            device=device,
        )
    )
    return {"accuracy": result["accuracy"], "interval_95": result["interval_95"], "answered": result["answered"]}


def summary(figures: dict[str, Any]) -> str:
    """The table that ends the demo."""
    total = sum(stage["seconds"] for stage in figures["stages"])
    rows: list[tuple[str, str]] = [("question-only floor", f"{figures['question_only_floor']:6.1%}")]
    for name in sorted(figures["accuracy"], key=lambda name: name == "teacher"):  # the teacher last
        result = figures["accuracy"][name]
        low, high = result["interval_95"]
        rows.append((name, f"{result['accuracy']:6.1%}   95 % interval {low:.1%} to {high:.1%}"))
    width = max(len(name) for name, _ in rows)
    lines = [f"easy-VQA, official test split, seed {figures['seed']}", ""]
    lines += [f"  {name:<{width}}  {value}" for name, value in rows]
    lines += ["", f"  {total / 60:.1f} minutes in all", f"  report: {figures['report']}"]
    return "\n".join(lines)
