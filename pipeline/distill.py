"""Stage two: train the student from the cache; the teacher is never loaded.

1. Open the cache and refuse what does not fit the student. 2. Index the data file; every sample must have its row.
3. Train with transformers' Trainer. 4. Write the student in Hugging Face form and in the official layout.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from alignkd.cache_store.reader import CacheReader
from alignkd.models.loading import load_vlm, save_vlm
from alignkd.models.vlm import Vlm
from alignkd.objective import Objective, TeacherShape
from alignkd.pipeline.features import cache_tower_features
from alignkd.pipeline.interrupt import Interrupted, StopFlag, stop_on_signals
from alignkd.pipeline.loader import TrainingSet
from alignkd.pipeline.logits_io import open_codec, settings_of
from alignkd.pipeline.optimizers import OptimizerName
from alignkd.pipeline.prepare import DEFAULT_MAX_LENGTH, Preparer
from alignkd.pipeline.progress import bar
from alignkd.pipeline.provenance import peak_memory_bytes, pick_device, write_run
from alignkd.pipeline.samples import SampleFile
from alignkd.pipeline.slice_io import SLICED, is_slice, open_slice
from alignkd.pipeline.trainer import DistillTrainer, MetricsCheckpoint, RunCallback
from alignkd.prompts import TEMPLATES
from alignkd.recipes import Recipe, describe


@dataclass(frozen=True)
class DistillConfig:
    """What ``alignkd distill`` was asked to do. ``template`` and ``max_length`` default to the cache's."""

    student: str
    data: str
    images: str | None
    out: str
    recipe: Recipe
    cache: str | None = None
    template: str | None = None
    max_length: int | None = None
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 16
    gradient_accumulation: int = 1
    learning_rate: float = 4e-5
    projector_learning_rate: float | None = None
    optimizer: OptimizerName = "adamw"
    muon_learning_rate: float = 0.02
    warmup: float = 0.03
    weight_decay: float = 0.0
    seed: int = 0
    dtype: str = "float32"
    device: str | None = None
    gradient_checkpointing: bool = False
    save_steps: int = 500
    log_steps: int = 10
    workers: int | None = None
    resume: bool = False
    cache_tower_features: bool = False
    vision_tower: str | None = None
    max_rejected: int = 100
    feature_bytes: int = field(default=4 * 2**30)


def check_fit(student: Vlm, found: Mapping[str, Any], config: DistillConfig) -> tuple[str, int]:
    """Refuse a cache that this student, template or maximum length does not fit; the template and length to use.

    Raises:
        ValueError: names what differs, both values and the way out.
    """
    template = config.template or found["template"]
    max_length = config.max_length or found["max_length"]
    pairs = {
        "vocabulary": (found["teacher"]["vocabulary"], student.vocabulary),
        "vision tokens an image": (found["vision_tokens_per_image"], student.vision_tokens_per_image),
        "tokenizer": (found["tokenizer"][:12], student.tokenizer_fingerprint()[:12]),
        "image preprocessing": (found["image_preprocessing"][:12], student.images.fingerprint()[:12]),
        "template": (found["template"], template),
        "maximum length": (found["max_length"], max_length),
    }
    differing = [f"{name}: {was} in the cache, {now} here" for name, (was, now) in pairs.items() if was != now]
    if differing:
        raise ValueError(
            f"the cache {config.cache} does not fit: {'; '.join(differing)}. Use a student and settings that match the"
            " teacher's, or write another cache with alignkd cache-teacher"
        )
    return str(template), int(max_length)


def check_targets(found: Mapping[str, Any], recipe: Recipe) -> None:
    """Refuse a recipe whose targets the cache lacks, or logits cached at another temperature.

    Raises:
        ValueError: names the target, and the way out.
    """
    held = found["targets"]
    lacking = sorted(name for name in recipe.needs if not held[name])
    if lacking:
        raise ValueError(
            f"recipe {recipe.name!r} needs {', '.join(lacking)}, which the cache does not hold; choose another --recipe,"
            f" or cache with --targets {','.join(sorted(recipe.needs))}"
        )
    # Hidden states serve any temperature: theirs is None.
    if "logits" in recipe.needs and held["logits"]["temperature"] not in (None, recipe.temperature):
        raise ValueError(
            f"the cache holds logits at temperature {held['logits']['temperature']}, the recipe wants"
            f" {recipe.temperature}: such targets of one temperature do not serve another; use --set"
            f" temperature={held['logits']['temperature']} or cache with --temperature {recipe.temperature}"
        )


def distill(config: DistillConfig) -> dict[str, Any]:
    """Train, save, and report figures of the run.

    Raises:
        ValueError: bad input, or a cache that does not fit.
        Interrupted: a signal came; a checkpoint was written.
    """
    with stop_on_signals() as stop:
        return _distill(config, stop)


def _distill(config: DistillConfig, stop: StopFlag) -> dict[str, Any]:
    out = Path(config.out)
    _check_out(out, config.resume)
    reader = _open_cache(config)
    set_seed(config.seed)
    tower = Path(config.vision_tower) if config.vision_tower else None
    student = load_vlm(config.student, device=pick_device(config.device), vision_tower=tower)
    template, max_length, shape = _settle(student, reader, config)
    needs, teacher_slice = config.recipe.needs, None
    if reader is not None and is_slice(reader.fingerprint):
        teacher_slice = open_slice(reader, student, needs, features_only=config.cache_tower_features)
        needs -= SLICED
    logit_codec = None
    if reader is not None and "logits" in needs:
        logit_codec = open_codec(settings_of(reader.fingerprint), reader.tensors, student.device)
    preparer = Preparer.of(student, template=template, max_length=max_length, image_root=config.images)
    data = TrainingSet(
        SampleFile(config.data),
        preparer,
        student=student,
        reader=reader,
        needs=needs,
        max_rejected=config.max_rejected,
    )
    objective = Objective(student, config.recipe, shape, teacher_slice, logit_codec)
    if config.gradient_checkpointing:
        objective.recompute_activations()
    resolved = asdict(config) | {"template": template, "max_length": max_length, "recipe": describe(config.recipe)}
    resolved |= {
        "samples": len(data),
        "data_keys": data.fingerprint(),
        "cache_fingerprint": reader.fingerprint if reader else None,
    }
    if config.resume:
        _check_same_run(out / "run.json", resolved)
    write_run(out / "run.json", "distill", resolved)
    if config.cache_tower_features:
        cache_tower_features(student, data, limit_bytes=config.feature_bytes)
    stop.check()
    figures = _train(config, objective, data, out, stop)
    student.model.eval()
    save_vlm(student, out / "student")
    save_vlm(student, out / "student-official", official=True)
    figures["student"] = str(out / "student")
    (out / "result.json").write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def _check_out(out: Path, resume: bool) -> None:
    if not resume and (out / "metrics.jsonl").exists():
        raise ValueError(f"--out {out} already holds a run; go on with --resume, or choose another folder")


_MAY_CHANGE = ("resume", "device", "workers", "save_steps", "log_steps", "max_rejected", "out", "images", "data", "cache")
"""What a resumed run may be given anew: nothing that changes what is learned. Data and cache are compared by content."""


def _check_same_run(path: Path, resolved: dict[str, Any]) -> None:
    """Refuse to go on with a run of other settings.

    Raises:
        ValueError: names each setting that differs, with both values.
    """
    if not path.is_file():
        return
    before = json.loads(path.read_text())["configuration"]
    now = json.loads(json.dumps(resolved, default=str))
    differing = [
        f"{name}: {before.get(name)!r} before, {value!r} now"
        for name, value in now.items()
        if name not in _MAY_CHANGE and before.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"--resume: {path.parent} was run with other settings: {'; '.join(differing)}. Resume with the same ones, or"
            " choose another --out"
        )


def _open_cache(config: DistillConfig) -> CacheReader | None:
    if config.cache is None:
        if config.recipe.needs:
            raise ValueError(
                f"recipe {config.recipe.name!r} needs {', '.join(sorted(config.recipe.needs))} from a teacher: give --cache"
            )
        return None
    reader = CacheReader(config.cache)
    check_targets(reader.fingerprint, config.recipe)
    return reader


def _settle(student: Vlm, reader: CacheReader | None, config: DistillConfig) -> tuple[str, int, TeacherShape | None]:
    if reader is None:
        template = config.template or student.default_template
        if template not in TEMPLATES:
            raise ValueError(f"--template {template}: known are {', '.join(TEMPLATES)}")
        return template, config.max_length or DEFAULT_MAX_LENGTH, None
    found = reader.fingerprint
    template, max_length = check_fit(student, found, config)
    heads = 1 if found["targets"]["attention"] == "mean" else found["teacher"]["heads"]
    return template, max_length, TeacherShape(heads, found["teacher"]["width"])


def _train(config: DistillConfig, objective: Objective, data: TrainingSet, out: Path, stop: StopFlag) -> dict[str, Any]:
    arguments = _arguments(config, out)
    metrics_checkpoint = MetricsCheckpoint()
    steps = _total_steps(config, len(data), arguments.world_size)
    checkpoint = _last_checkpoint(out / "checkpoints") if config.resume else None
    done = int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0
    with bar(f"distill {config.recipe.name}", steps, "steps", done=done) as progress:
        trainer = DistillTrainer(
            objective,
            arguments,
            data,
            projector_learning_rate=config.projector_learning_rate,
            optimizer_name=config.optimizer,
            muon_learning_rate=config.muon_learning_rate,
            metrics_path=out / "metrics.jsonl",
            callbacks=[RunCallback(progress, stop), metrics_checkpoint],
        )
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        metrics_checkpoint.metrics = trainer.metrics
        state = json.loads((checkpoint / MetricsCheckpoint.NAME).read_text()) if checkpoint is not None else {}
        trainer.metrics.resume(state, done)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if stop and trainer.state.global_step < steps:
            raise Interrupted(f"stopped by {stop.signal_name} at step {trainer.state.global_step}; go on with --resume")
    totals = trainer.metrics.state_dict()
    return {
        "steps": trainer.state.global_step,
        "samples": int(totals["samples"]),
        "tokens": int(totals["tokens"]),
        "seconds": round(totals["seconds"], 3),
        "tokens_per_second": round(totals["tokens"] / totals["seconds"], 1),
        "rejected": data.rejects.count,
        "rejected_samples": data.rejects.reasons,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _total_steps(config: DistillConfig, samples: int, processes: int) -> int:
    if config.max_steps is not None:
        return config.max_steps
    per_epoch = math.ceil(math.ceil(samples / (config.batch_size * processes)) / config.gradient_accumulation)
    return math.ceil(config.epochs * per_epoch)


def _arguments(config: DistillConfig, out: Path) -> TrainingArguments:
    device = pick_device(config.device)
    return TrainingArguments(
        output_dir=str(out / "checkpoints"),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps if config.max_steps is not None else -1,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=1.0,
        seed=config.seed,
        bf16=config.dtype == "bfloat16",
        fp16=config.dtype == "float16",
        use_cpu=device == "cpu",
        logging_steps=config.log_steps,
        logging_first_step=True,
        save_steps=config.save_steps,
        save_total_limit=2,
        dataloader_num_workers=config.workers if config.workers is not None else (4 if device != "cpu" else 0),
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        ddp_broadcast_buffers=False,  # all of them are constants of the cache
    )


def _last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose last file was written."""
    complete = [p for p in folder.glob("checkpoint-*") if (p / MetricsCheckpoint.NAME).is_file()]
    return max(complete, key=lambda p: int(p.name.rsplit("-", 1)[1]), default=None)
