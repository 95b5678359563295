"""Stage two: train the student from the cache; the teacher is never loaded.

1. Open the cache and refuse what does not fit the student. 2. Index the data file; every sample must have its row.
3. Train with transformers' Trainer, on one process or many. 4. Write the student in Hugging Face form and in the official
layout.
"""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.capture.layer_pairs import needed_layers
from alignkd.capture.online_teacher import OnlineTeacher
from alignkd.inputs.prompts import check_template
from alignkd.losses.recipes import describe, term_weights
from alignkd.models.loading import load_vlm, save_vlm
from alignkd.models.vlm import Vlm
from alignkd.objective import Objective, TargetSource, TeacherShape
from alignkd.pipeline.cache_io.compatibility import check_attention_layers, check_student_matches, check_targets, check_teacher
from alignkd.pipeline.cache_io.cross_model import CrossModelMap
from alignkd.pipeline.cache_io.logits import open_codec, settings_of
from alignkd.pipeline.cache_io.teacher_slice import open_slice
from alignkd.pipeline.config.cache_layout import SLICED, is_slice
from alignkd.pipeline.config.distill import DistillConfig
from alignkd.pipeline.config.shared import DEFAULT_MAX_LENGTH
from alignkd.pipeline.data.preparer import Preparer
from alignkd.pipeline.data.samples import SampleFile
from alignkd.pipeline.feeding.dataset import TrainingSet
from alignkd.pipeline.feeding.feature_cache import cache_tower_features
from alignkd.pipeline.feeding.lengths import check_budget, sample_lengths
from alignkd.pipeline.feeding.order import SHARDS_OPEN, BatchOrder
from alignkd.pipeline.runtime.devices import parse_dtype, peak_memory_bytes, pick_device
from alignkd.pipeline.runtime.processes import Processes, find_process
from alignkd.pipeline.runtime.progress import bar
from alignkd.pipeline.runtime.ranks import Worker
from alignkd.pipeline.runtime.run_record import write_run
from alignkd.pipeline.runtime.signals import Interrupted, StopFlag, stop_on_signals
from alignkd.pipeline.training.checkpoints import newest, step_of, sweep
from alignkd.pipeline.training.lora import LoraSettings, add_lora, merge_lora
from alignkd.pipeline.training.metrics import Metrics
from alignkd.pipeline.training.resume_checks import check_out, check_same_run
from alignkd.pipeline.training.tensorboard import TensorBoard
from alignkd.pipeline.training.trainer import DistillTrainer, OptimizerSettings, RunCallback, Schedule
from alignkd.pipeline.training.training_arguments import training_arguments, zero_stage
from alignkd.targets.logits import LogitCodec


def distill(config: DistillConfig) -> dict[str, Any]:
    """Train, save, and report figures of the run; every process of a torchrun job calls it, and the first one reports.

    Raises:
        ValueError: bad input, or a cache that does not fit.
        Interrupted: a signal came; a checkpoint was written.
    """
    process = find_process()
    with stop_on_signals() as stop:
        try:
            return _Run(config, process, stop).distill()
        finally:
            if dist.is_initialized() and process.world_size > 1:
                dist.destroy_process_group()


@dataclass
class _Run:
    """One run of stage two, from its configuration on; parts are made when they are first asked for."""

    config: DistillConfig
    process: Worker
    stop: StopFlag

    def distill(self) -> dict[str, Any]:
        config, out = self.config, self.out
        check_out(out, resume=config.resume)
        _check_options(config)
        set_seed(config.seed)
        assert self.reader is None or self.reader.fingerprint  # opened before the student, which takes longer
        self._check_fit()
        objective = self._objective()  # before LoRA and DeepSpeed change what the student's modules are
        schedule = self._schedule()
        arguments = training_arguments(config, out, self.process, steps=schedule.steps)
        processes = Processes(self.process)
        resolved = self._resolved(len(self.data), schedule)
        if config.resume:
            check_same_run(out / "run.json", resolved)
        processes.wait()  # nobody writes before all have looked
        if processes.first:
            write_run(out / "run.json", "distill", resolved)
        if config.cache_tower_features:
            cache_tower_features(self.student, self.data, limit_bytes=config.feature_bytes)
        self.stop.check()
        figures = self._train(objective, arguments, schedule, processes)
        self._save(processes, figures)
        return figures if processes.first else {}

    @property
    def out(self) -> Path:
        return Path(self.config.out)

    @cached_property
    def reader(self) -> CacheReader | None:
        config = self.config
        if config.cache is None:
            if config.recipe.needs and config.online_teacher is None:
                raise ValueError(
                    f"recipe {config.recipe.name!r} needs {', '.join(sorted(config.recipe.needs))} from a teacher: give"
                    " --cache (or --online-teacher)"
                )
            return None
        reader = CacheReader(config.cache, max_shards=2 * SHARDS_OPEN)  # of this window of samples, and of the next
        if config.online_teacher is None:
            check_targets(reader.fingerprint, config.recipe)
        return reader

    @cached_property
    def device(self) -> str:
        return pick_device(self.config.device, self.process.local_rank)

    @cached_property
    def student(self) -> Vlm:
        tower = Path(self.config.vision_tower) if self.config.vision_tower else None
        return load_vlm(self.config.student, device=self.device, vision_tower=tower)

    @cached_property
    def template(self) -> str:
        template = self.config.template or self._template_of_cache() or self.student.default_template
        check_template(template, self.student.templates)
        return template

    def _template_of_cache(self) -> str | None:
        """The cache's, where a teacher of the student's family wrote it: one of another make has prompts of its own."""
        if self.reader is None:
            return None
        found = self.reader.fingerprint
        template = str(found["template"])
        same = found["teacher"].get("family", self.student.family) == self.student.family
        return template if same and template in self.student.templates else None

    @cached_property
    def max_length(self) -> int:
        return self.config.max_length or (int(self.reader.fingerprint["max_length"]) if self.reader else DEFAULT_MAX_LENGTH)

    @cached_property
    def across(self) -> CrossModelMap | None:
        """How the cache's rows become targets of a student of another make."""
        if self.reader is None:
            return None
        needs = self.config.recipe.needs if self.config.online_teacher is None else frozenset[str]()
        return check_student_matches(
            self.student,
            self.reader.fingerprint,
            self.template,
            self.max_length,
            self.reader.url,
            needs=needs,
            fields=[field.name for field in self.reader.spec.fields],
        )

    def _check_fit(self) -> None:
        assert self.across is None or self.reader is not None
        assert self.teacher_layers != 0  # looked at before the data file is read, which takes longer

    @cached_property
    def teacher_layers(self) -> int | None:
        """How many the teacher of the cache has; None where it does not matter."""
        config = self.config
        if self.reader is None or config.online_teacher is not None or "attention" not in config.recipe.needs:
            return None
        return check_attention_layers(self.student, self.reader.fingerprint, config.recipe)

    @cached_property
    def data(self) -> TrainingSet:
        config, needs = self.config, self.config.recipe.needs
        if config.online_teacher is not None:
            needs = frozenset()
        elif self.reader is not None and is_slice(self.reader.fingerprint):
            needs -= SLICED
        return TrainingSet(
            SampleFile(config.data),
            Preparer.of(
                self.student,
                template=self.template,
                max_length=self.max_length,
                image_root=config.images,
                with_spans=self.across is not None,
            ),
            student=self.student,
            reader=self.reader,
            needs=needs,
            max_rejected=config.max_rejected,
            across=self.across,
            attention_layers=needed_layers(config.recipe, self.student, self.teacher_layers) if "attention" in needs else (),
        )

    def _objective(self) -> Objective:
        config = self.config
        source, codec, shape = self._teacher_in_loop() if config.online_teacher is not None else self._teacher_in_cache()
        objective = Objective(
            self.student, config.recipe, shape, source, codec, keep_all_parameters_in_graph=self.process.world_size > 1
        )
        if config.gradient_checkpointing:
            objective.recompute_activations()
        if config.lora:
            if config.dtype != "float32":
                self.student.model.to(parse_dtype(config.dtype))  # frozen weights need no better
            self.peft_model = add_lora(self.student, LoraSettings(config.lora_rank, config.lora_alpha, config.lora_dropout))
            self.student.freeze_tower()
        return objective

    def _teacher_in_cache(self) -> tuple[TargetSource | None, LogitCodec | None, TeacherShape | None]:
        reader, needs = self.reader, self.config.recipe.needs
        if reader is None:
            return None, None, None
        found, codec = reader.fingerprint, None
        source = open_slice(reader, self.student, needs, features_only=self.config.cache_tower_features)
        if "logits" in needs:
            codec = open_codec(settings_of(found), reader.tensors, self.student.device)
        heads = 1 if found["targets"]["attention"] == "mean" else found["teacher"]["heads"]
        return source, codec, TeacherShape(heads, found["teacher"]["width"], self.teacher_layers)

    def _teacher_in_loop(self) -> tuple[TargetSource, LogitCodec, TeacherShape]:
        config = self.config
        assert config.online_teacher is not None
        dtype = parse_dtype(config.teacher_dtype or config.dtype)
        tower = Path(config.vision_tower) if config.vision_tower else None
        teacher = load_vlm(config.online_teacher, dtype=dtype, device=self.device, vision_tower=tower)
        check_teacher(self.student, teacher, self.template)
        layers = needed_layers(config.recipe, self.student, teacher.layers)
        source = OnlineTeacher(teacher, self.student, features_only=config.cache_tower_features, attention_layers=layers)
        return source, source.logit_codec, TeacherShape(teacher.heads, teacher.hidden_size, teacher.layers)

    def _schedule(self) -> Schedule:
        config, lengths = self.config, None
        if config.group_by_length or config.batch_tokens is not None:
            show = self.process.rank == 0
            lengths = sample_lengths(self.data, self.student, self.out, workers=config.workers or 0, show=show)
            if config.batch_tokens is not None:
                check_budget(self.data, lengths, config.batch_tokens)
        order = BatchOrder(
            self.data.shard_of_sample,
            seed=config.seed,
            window=SHARDS_OPEN,
            batch_size=config.samples_at_once,
            lengths=lengths,
            group_by_length=config.group_by_length,
            batch_tokens=config.batch_tokens,
        )
        per_step = config.gradient_accumulation * self.process.world_size
        return Schedule(order, config.max_steps or order.total_steps(config.epochs, per_step), per_step)

    def _resolved(self, samples: int, schedule: Schedule) -> dict[str, Any]:
        config, micro_batches = self.config, schedule.per_step
        step: dict[str, Any] = {
            "micro_batches": micro_batches,
            "samples": config.samples_at_once,
            "positions": config.batch_tokens,
        }
        if not config.group_by_length and config.batch_tokens is None:
            assert config.samples_at_once is not None
            step = {"samples": micro_batches * config.samples_at_once}  # however they are split
        return {
            **asdict(config),
            "template": self.template,
            "max_length": self.max_length,
            "recipe": describe(config.recipe),
            "step": step,
            "steps": schedule.steps,
            "samples": samples,
            "data_keys": self.data.fingerprint(),
            "cache_fingerprint": self.reader.fingerprint if self.reader else None,
        }

    def _train(self, objective: Objective, arguments: Any, schedule: Schedule, processes: Processes) -> dict[str, Any]:
        config, out = self.config, self.out
        found = newest(out / "checkpoints") if config.resume else None
        checkpoint, state = found if found is not None else (None, {})
        done = step_of(checkpoint) if checkpoint is not None else 0
        self._check_processes(state)
        processes.wait()
        if processes.first:
            sweep(out / "checkpoints")
        learned = config.recipe.weighting == "learned"
        metrics = Metrics(out / "metrics.jsonl", term_weights(config.recipe), learned=learned, writes=processes.first)
        title = f"distill {config.recipe.name}"
        with bar(title, schedule.steps, "steps", done=done, show=processes.first) as progress:
            callback = RunCallback(progress)
            trainer = DistillTrainer(
                objective,
                arguments,
                self.data,
                schedule=schedule,
                done=done,
                processes=processes,
                optimizer=OptimizerSettings(config.optimizer, config.muon_learning_rate, config.projector_learning_rate),
                metrics=metrics,
                stop=self.stop,
                term_gradients=config.term_gradients,
                callbacks=[callback, *([TensorBoard(out / "tensorboard")] if "tensorboard" in config.report_to else [])],
            )
            callback.trainer = trainer
            for unwanted in (PrinterCallback, ProgressCallback):
                trainer.remove_callback(unwanted)
            metrics.resume(state.get("metrics", {}), done)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if trainer.state.global_step < schedule.steps:
                assert self.stop or trainer.stop_agreed
                signal = self.stop.signal_name or "a signal to another process"
                raise Interrupted(f"stopped by {signal} at step {trainer.state.global_step}; go on with --resume")
        totals = metrics.state_dict(processes.reduce if processes.world_size > 1 else None)
        return {
            "steps": trainer.state.global_step,
            "samples": int(totals["samples"]),
            "tokens": int(totals["tokens"]),
            "seconds": round(totals["seconds"], 3),
            "tokens_per_second": round(totals["tokens"] / totals["seconds"], 1),
            "processes": processes.world_size,
            "rejected": self.data.rejects.count,
            "rejected_samples": self.data.rejects.reasons,
            "peak_memory_bytes": peak_memory_bytes(),
        }

    def _check_processes(self, state: Mapping[str, Any]) -> None:
        before = state.get("processes", self.process.world_size)
        if self.config.deepspeed is not None and before != self.process.world_size:
            raise ValueError(
                f"--resume: the checkpoint was written by {before} processes, and DeepSpeed's can be read by as many only, not"
                f" by {self.process.world_size}: resume with {before}"
            )

    def _save(self, processes: Processes, figures: dict[str, Any]) -> None:
        student, out = self.student, self.out
        gathered: Any = nullcontext()
        if zero_stage(self.config.deepspeed) == 3:
            import deepspeed

            gathered = deepspeed.zero.GatheredParameters(list(student.model.parameters()))
        with gathered:
            if processes.first:
                student.model.eval()
                if self.config.lora:
                    merge_lora(self.peft_model, out / "adapter")
                save_vlm(student, out / "student")
                if student.has_official_layout:
                    save_vlm(student, out / "student-official", official=True)
                figures["student"] = str(out / "student")
                (out / "result.json").write_text(json.dumps(figures, indent=2) + "\n")
        processes.wait()


def _check_options(config: DistillConfig) -> None:
    """Refuse options that contradict each other.

    Raises:
        ValueError: names them.
    """
    if config.deepspeed is not None and config.optimizer != "adamw":
        raise ValueError(f"--optimizer {config.optimizer} does not run under --deepspeed; use adamw")
    if config.term_gradients and zero_stage(config.deepspeed) == 3:
        raise ValueError("--term-gradients needs every parameter on every process, which ZeRO-3 does not keep; use zero2")
    if config.teacher_dtype is not None and config.online_teacher is None:
        raise ValueError("--teacher-dtype is about --online-teacher, which is not given")
