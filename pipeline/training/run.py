"""Stage two: train the student from the cache; the teacher is never loaded.

1. Open the cache, and refuse it if it is not compatible with the student. 2. Index the data file; every sample must have its
row. 3. Train with transformers' Trainer, on one process or many. 4. Write the student in Hugging Face form and in the
official layout.
"""

import json
from pathlib import Path
from typing import Any

from transformers import TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from alignkd.losses.recipes import term_weights
from alignkd.models.tower_aside import set_tower_aside
from alignkd.objective import Objective
from alignkd.pipeline.config.distill import DistillConfig
from alignkd.pipeline.config.shared import several
from alignkd.pipeline.feeding.dataset import TrainingSet
from alignkd.pipeline.feeding.feature_cache import cache_tower_features
from alignkd.pipeline.feeding.loader_processes import lost_loader
from alignkd.pipeline.hub.card_file import record_of, write_card
from alignkd.pipeline.hub.models import pin_models
from alignkd.pipeline.runtime.devices import device_words, peak_memory_bytes, pick_device
from alignkd.pipeline.runtime.files import check_out_folder, replace_text
from alignkd.pipeline.runtime.logs import log_start
from alignkd.pipeline.runtime.out_folder.lock import RunLock, hold_by_first
from alignkd.pipeline.runtime.out_folder.write_faults import explained_write_faults
from alignkd.pipeline.runtime.processes import Processes, lost_processes
from alignkd.pipeline.runtime.progress import progress_bar
from alignkd.pipeline.runtime.ranks import Worker, find_process
from alignkd.pipeline.runtime.rendezvous import joined_processes
from alignkd.pipeline.runtime.run_record import write_run_record
from alignkd.pipeline.runtime.signals import Interrupted, StopFlag, stop_on_signals
from alignkd.pipeline.training.callbacks import RunCallback
from alignkd.pipeline.training.checkpoints import find_latest, remove_incomplete, step_of
from alignkd.pipeline.training.evaluation.best import FOLDER
from alignkd.pipeline.training.evaluation.evaluation import EndedEarlyError, Evaluation
from alignkd.pipeline.training.evaluation.open import open_evaluation
from alignkd.pipeline.training.evaluation.plan import plan_evaluation
from alignkd.pipeline.training.monitoring.metrics import Metrics
from alignkd.pipeline.training.monitoring.summary import (
    answers_by_author,
    final_terms,
    folders,
    image_warnings,
    next_command,
    rejection_warnings,
    taught_by,
)
from alignkd.pipeline.training.monitoring.tensorboard import TensorBoard
from alignkd.pipeline.training.optimizers import OptimizerSettings
from alignkd.pipeline.training.resume_checks import (
    check_out,
    check_processes,
    check_same_run,
    check_trainer_state,
    recorded_configuration,
    resolved_settings,
)
from alignkd.pipeline.training.run_inputs import check_options, open_data, open_inputs
from alignkd.pipeline.training.schedule import Schedule, make_schedule
from alignkd.pipeline.training.student import build_objective, save_student
from alignkd.pipeline.training.teacher_source import open_teachers
from alignkd.pipeline.training.trainer import DistillTrainer
from alignkd.pipeline.training.training_arguments import training_arguments
from alignkd.pipeline.training.vision_input import TOWER_FILE
from alignkd.plugins import load_plugins


def distill(config: DistillConfig) -> dict[str, Any]:
    """Train, save, and return figures of the run. Every process of a torchrun job calls it; the first returns the figures.

    Raises:
        AlignkdError: bad input, or parts that do not belong together.
        Interrupted: a signal came; a checkpoint was written.
    """
    process = find_process()
    load_plugins(config.plugins)
    check_options(config)
    device = pick_device(config.device, process.local_rank)
    deepspeed = config.deepspeed is not None
    joined = joined_processes(process, device=device, longest_wait_s=config.max_wait, deepspeed=deepspeed)
    out = Path(config.out)
    check_out_folder(out)
    with (
        stop_on_signals() as stop,
        joined as processes,
        lost_processes(processes.world_size),
        hold_by_first(out, processes, stop) as lock,
    ):
        return _distill(config, process, processes, stop, lock)


def _distill(
    config: DistillConfig, process: Worker, processes: Processes, stop: StopFlag, lock: RunLock | None
) -> dict[str, Any]:
    out = Path(config.out)
    check_out(out, resume=config.resume)
    config = pin_models(processes.by_first(lambda: pin_models(config, recorded_configuration(config))))
    set_seed(config.seed)
    plan = plan_evaluation(config)
    inputs = open_inputs(config, process)
    objective, peft_model = build_objective(inputs, open_teachers(inputs), processes=process.world_size)
    data = open_data(inputs)
    evaluation = open_evaluation(plan, inputs, data, objective, peft_model, processes, stop)
    schedule = make_schedule(config, data, inputs.student, process)
    arguments = training_arguments(config, out, inputs.device, steps=schedule.steps)
    settings = resolved_settings(inputs, data, schedule) | {"eval_keys": evaluation.fingerprint()}
    if config.resume:
        check_same_run(out / "run.json", settings)
    processes.wait()  # nobody writes before all have read
    if processes.first:
        with explained_write_faults(out, "run.json"):
            write_run_record(out / "run.json", "distill", settings)
    if inputs.cached_tokens:
        with explained_write_faults(out, TOWER_FILE):
            set_tower_aside(inputs.student, out / TOWER_FILE, write=processes.first)
    elif config.cache_tower_features:
        cache_tower_features(inputs.student, data, limit_bytes=config.feature_bytes)
    stop.check()
    log_start(
        "distill",
        rank=str(process),
        device=device_words(inputs.device),
        student=config.student,
        data=f"{config.data_words} ({len(data):,} samples)",
        datasets=data.samples.datasets or None,
        images="not read: the rows' image hashes are trusted" if inputs.cached_tokens else config.images_words,
        cache=", ".join(several(config.cache)) or None,
        plan=f"{schedule.steps:,} steps of {schedule.per_step:,} micro-batches, recipe {config.recipe.name}",
        out=config.out,
        template=inputs.template,
    )
    figures = _train(config, objective, arguments, data, schedule, processes, stop, lock, evaluation)
    with explained_write_faults(out, "the student", lambda: "The last checkpoint holds all that was learned."):
        if lock is not None:
            lock.check()
        folder = save_student(objective, peft_model, out, deepspeed=config.deepspeed, first=processes.first)
        if processes.first:
            for saved in (folder, out / "student-official"):
                if saved.is_dir():
                    write_card(saved, record_of(out), result=figures)
            best = out / FOLDER / "student"
            asked = best if config.keep_best is not None and best.is_dir() else folder
            figures |= {"student": str(folder), "out": str(out), "folders": folders(out), "next": next_command(config, asked)}
            (out / TOWER_FILE).unlink(missing_ok=True)
            replace_text(out / "result.json", json.dumps(figures, indent=2) + "\n")
    processes.wait()
    return figures if processes.first else {}


def _train(
    config: DistillConfig,
    objective: Objective,
    arguments: TrainingArguments,
    data: TrainingSet,
    schedule: Schedule,
    processes: Processes,
    stop: StopFlag,
    lock: RunLock | None,
    evaluation: Evaluation,
) -> dict[str, Any]:
    """Train from the latest complete checkpoint, or from the start. Returns the run's figures.

    Raises:
        Interrupted: a signal came; a checkpoint was written.
    """
    out = Path(config.out)
    checkpoint, state = _resume_point(config, processes)
    done = step_of(checkpoint) if checkpoint is not None else 0
    learned = config.recipe.weighting == "learned"
    teachers = len(data.caches) if len(data.caches) > 1 else 0
    metrics = Metrics(
        out / "metrics.jsonl",
        term_weights(config.recipe),
        learned=learned,
        writes=processes.first,
        teachers=teachers,
        answer_terms=("supervised", *config.recipe.divergences),
    )
    title = f"distill {config.recipe.name}"
    with progress_bar(title, schedule.steps, "steps", done=done, show=processes.first) as progress:
        callback = RunCallback(progress)
        trainer = DistillTrainer(
            objective,
            arguments,
            data,
            schedule=schedule,
            done=done,
            processes=processes,
            optimizer=OptimizerSettings(config.optimizer, config.muon_learning_rate, config.projector_learning_rate),
            metrics=metrics,
            stop=stop,
            longest_wait_s=config.max_wait,
            save_total_limit=config.save_total_limit,
            evaluation=evaluation,
            lock=lock,
            term_gradients=config.term_gradients,
            callbacks=[callback, *([TensorBoard(out / "tensorboard")] if "tensorboard" in config.report_to else [])],
        )
        callback.trainer = trainer
        for unwanted in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(unwanted)
        trainer.health_checks.resume(state.get("warnings"))
        evaluation.resume(state.get("evaluation"))
        metrics.resume(state.get("metrics", {}), done, evaluated=evaluation.done_step)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except EndedEarlyError:
            pass  # the student of the checkpoint is the run's
        except RuntimeError as error:
            raise (lost_loader(error) or error) from error
        finally:
            trainer.close()
        left = not evaluation.ended_early and evaluation.due(trainer.state.global_step, schedule.steps)
        if left or (trainer.state.global_step < schedule.steps and not evaluation.ended_early):
            signal = stop.signal_name or "a signal to another process"
            raise Interrupted(f"stopped by {signal} at step {trainer.state.global_step}; continue with --resume")
    totals = metrics.state_dict(processes.reduce if processes.world_size > 1 else None)
    line, rejects = metrics.last, data.rejects
    return {
        "steps": trainer.state.global_step,
        "samples": int(totals["samples"]),
        "tokens": int(totals["tokens"]),
        "truncated": int(totals["truncated"]),
        "padding_share": round(totals["padding"] / max(totals["tokens"], 1), 5),
        "seconds": round(totals["seconds"], 3),
        "samples_per_second": round(totals["samples"] / totals["seconds"], 3),
        "tokens_per_second": round(totals["tokens"] / totals["seconds"], 1),
        "loss": line.get("loss"),
        "terms": final_terms(line),
        **taught_by(data.caches, totals),
        **answers_by_author(totals),
        **evaluation.figures(),
        "processes": processes.world_size,
        "rejected": rejects.count,
        "rejected_samples": rejects.reasons,
        "peak_memory_bytes": peak_memory_bytes(),
        "warnings": [
            *trainer.health_checks.closing(line),
            *rejection_warnings(rejects.count, rejects.reasons.values()),
            *image_warnings(trainer.doubtful_images),
        ],
    }


def _resume_point(config: DistillConfig, processes: Processes) -> tuple[Path | None, dict[str, Any]]:
    """The latest whole checkpoint and its state, None and {} for a new start. Checkpoints that are not whole are removed."""
    folder = Path(config.out) / "checkpoints"
    found = processes.by_first(lambda: find_latest(folder)) if config.resume else None
    checkpoint, state = found if found is not None else (None, {})
    check_processes(config, state.get("processes", processes.world_size), processes.world_size)
    if checkpoint is not None:
        check_trainer_state(checkpoint / "trainer_state.json", step_of(checkpoint))
    processes.wait()  # nobody removes before all have read
    if processes.first:
        with explained_write_faults(folder, "checkpoints"):
            remove_incomplete(folder, checkpoint)
    return checkpoint, state
