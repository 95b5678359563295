"""transformers' Trainer around the objective: order, counts of a whole step, parameter groups, log lines and checks."""

import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import TrainerCallback, TrainingArguments

from alignkd.errors import ConfigError, DataError, wrap_errors
from alignkd.inputs.batch import Counts
from alignkd.losses.gradient_norms import term_gradient_norms
from alignkd.losses.recipes import one_term_recipes
from alignkd.losses.uniformity import attention_contrast
from alignkd.objective import Objective, Outcome
from alignkd.pipeline.feeding.batch_loader import TrainingLoader
from alignkd.pipeline.feeding.dataset import TrainingExample, TrainingSet
from alignkd.pipeline.feeding.order import StepSampler
from alignkd.pipeline.feeding.row_checks import MisalignedRowError
from alignkd.pipeline.runtime.out_folder.lock import RunLock
from alignkd.pipeline.runtime.out_folder.write_faults import explained_write_faults
from alignkd.pipeline.runtime.processes import Processes
from alignkd.pipeline.runtime.signals import Interrupted, StopFlag
from alignkd.pipeline.training.checkpointing_trainer import CheckpointingTrainer
from alignkd.pipeline.training.checkpoints import mark_complete, remove_oldest, sealed_or_removed
from alignkd.pipeline.training.evaluation.evaluation import EndedEarlyError, Evaluation
from alignkd.pipeline.training.monitoring.health_checks import FiniteCheck, HealthChecks
from alignkd.pipeline.training.monitoring.metrics import PRECISION, Metrics
from alignkd.pipeline.training.monitoring.tensorboard import EVAL
from alignkd.pipeline.training.optimizers import OptimizerSettings, optimizer_of
from alignkd.pipeline.training.schedule import Schedule
from alignkd.targets.several import SeveralTargets

_log = logging.getLogger(__name__)


class DistillTrainer(CheckpointingTrainer):
    """Trainer whose model is an :class:`~alignkd.objective.Objective` and whose order is :class:`StepSampler`'s.

    For Trainer the whole run is one epoch of steps: where a resumed run continues is arithmetic, and no batch is read only
    to be skipped. Terms and gradients are averaged over the whole step, however it is split into processes and micro-batches.
    """

    def __init__(
        self,
        objective: Objective,
        arguments: TrainingArguments,
        data: TrainingSet,
        *,
        schedule: Schedule,
        done: int,
        processes: Processes,
        optimizer: OptimizerSettings,
        metrics: Metrics,
        stop: StopFlag,
        longest_wait_s: float,
        save_total_limit: int,
        evaluation: Evaluation,
        lock: RunLock | None = None,
        term_gradients: bool = False,
        callbacks: list[TrainerCallback],
    ) -> None:
        self.objective, self.data, self.processes = objective, data, processes
        self.schedule, self.done, self.longest_wait_s = schedule, done, longest_wait_s
        self.save_total_limit, self.lock, self.evaluation = save_total_limit, lock, evaluation
        self.optimizer_settings = optimizer
        self.metrics, self.finite = metrics, FiniteCheck()
        self.health_checks = HealthChecks(objective.recipe, max_length=data.preparer.encoder.max_length)
        self.stop, self.stop_agreed = stop, False
        self.term_recipes = one_term_recipes(objective.recipe) if term_gradients else {}
        self._gradient_norms: dict[str, torch.Tensor] = {}
        self.doubtful_images: set[str] = set()
        self._last: Mapping[str, Any] | None = None
        self._loader: TrainingLoader | None = None
        super().__init__(model=objective, args=arguments, train_dataset=data, data_collator=data.collate, callbacks=callbacks)
        # Terms are already shares of the step: Trainer must not divide them by the number of batches again.
        self.loss_is_scaled_for_ga = True

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[list[int]]:
        return StepSampler(
            self.schedule.order,
            steps=self.schedule.steps,
            world_size=self.processes.world_size,
            rank=self.processes.rank,
            accumulation=self.schedule.per_step // self.processes.world_size,
            start_step=self.done,
        )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """This process's micro-batches; :meth:`_prepare_inputs` moves them to the device."""
        self._loader = TrainingLoader(
            self.data,
            self._get_train_sampler(),
            workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            seed=self.args.seed,
            longest_wait_s=self.longest_wait_s,
        )
        return self._loader

    def close(self) -> None:
        """End the loader processes, however training ended."""
        if self._loader is not None:
            self._loader.close()

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Counts]:
        """The micro-batches of a step, and the counts of the whole step over all processes."""
        started = time.perf_counter()
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        self.metrics.waited(time.perf_counter() - started)
        self.doubtful_images.update(reference for inputs in batches for reference in inputs["doubtful"])
        failures = [failure for inputs in batches for failure in inputs["failures"]]
        for failure in failures:
            if failure.fatal:
                raise MisalignedRowError(failure.reason)
        mine = [inputs["targets"].counts(inputs["batch"]) for inputs in batches if inputs["batch"] is not None]
        sums = self.processes.sum(
            [
                sum(counts.answers for counts in mine),
                sum(counts.with_text_after_image for counts in mine),
                sum(counts.with_image for counts in mine),
                sum(counts.samples for counts in mine),
                float(bool(self.stop)),
                float(len(failures)),
            ]
        )
        answers, with_text_after_image, with_image, samples, stops, failed = sums
        if failed:
            # Every process counts the failures of all of them, so that all stop at the same step.
            for failure in self.processes.gather(failures):
                self.data.rejects.add(failure.sample_id, failure.reason, key=failure.key)
        # A single process looks at its flag when the step is done; several must agree before it.
        self.stop_agreed = self.processes.world_size > 1 and stops > 0
        return batches, Counts(
            answers=answers,
            with_text_after_image=with_text_after_image,
            with_image=with_image,
            samples=samples,
            processes=self.processes.world_size,
        )

    def _prepare_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        if inputs["batch"] is None:
            return {"batch": None, "targets": None, "ids": [], "truncated": 0, "padding": 0, "written": []}
        moved = {name: inputs[name].to(self.args.device) for name in ("batch", "targets")}
        return {**moved, **{name: inputs[name] for name in ("ids", "truncated", "padding", "written")}}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The weighted sum of terms; each term stays on the device until the next log line."""
        assert not return_outputs
        counts: Counts = num_items_in_batch
        if inputs["batch"] is None:
            return self._dummy_loss(model, counts)
        self.finite.check()
        outcome: Outcome = model(batch=inputs["batch"], targets=inputs["targets"], counts=counts)
        self._record(outcome, inputs, counts)
        return outcome["loss"]

    def _record(self, outcome: Outcome, inputs: Mapping[str, Any], counts: Counts) -> None:
        batch = inputs["batch"]
        self.finite.add(outcome["bad_B"], inputs["ids"], step=self.state.global_step + 1)
        outputs = {"loss": outcome["loss"].detach() / counts.processes, **outcome["terms"]}
        outputs |= {PRECISION.format(name): precision for name, precision in outcome["precisions"].items()}
        if outcome["attention_BHTV"] is not None:
            masked = inputs["targets"].mask_to_targets(batch)
            masks = masked.text_mask_BT, masked.vision_mask_BV
            outputs["attention_contrast"] = attention_contrast(outcome["attention_BHTV"], *masks)
        if isinstance(inputs["targets"], SeveralTargets):
            outputs |= outcome["of_teachers"]
            self.metrics.add_of_teachers(outcome["of_teachers"], inputs["targets"].taught)
        tokens, answers = batch.input_ids_BS.numel(), batch.answer_ids_A.numel()
        counts_of_batch = {name: inputs[name] for name in ("truncated", "padding")}
        self.metrics.add(outputs, samples=batch.samples, tokens=tokens, answers=answers, **counts_of_batch)
        self.metrics.by_author.add(outcome["answer_losses"], inputs["written"], batch.answer_samples_A)
        self._last = {**inputs, "counts": counts}

    def _dummy_loss(self, model: nn.Module, counts: Counts) -> torch.Tensor:
        """The loss of a micro-batch without a usable sample: the step is made without a gradient from it.

        Where processes average gradients, a dummy batch runs with weight 0, to keep collectives matched across ranks.
        """
        if self.processes.world_size == 1:
            return next(p for p in model.parameters() if p.requires_grad).sum() * 0.0
        dummy = self._prepare_inputs(self._dummy_batch())
        loss: torch.Tensor = model(batch=dummy["batch"], targets=dummy["targets"], counts=counts)["loss"]
        return loss * 0.0

    def _dummy_batch(self) -> dict[str, Any]:
        """The first usable sample as a batch.

        Raises:
            DataError: there is none.
        """
        for position in range(len(self.data)):
            example = self.data[position]
            if isinstance(example, TrainingExample):
                return self.data.collate([example])
        raise DataError(f"no sample of {self.data.samples.path} can be used; see the reasons above")

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Over everything that trains; see :func:`~alignkd.pipeline.training.optimizers.optimizer_of`."""
        if self.optimizer is None:  # type: ignore[has-type]
            self.optimizer = optimizer_of(
                self.objective,
                self.optimizer_settings,
                learning_rate=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                fused=self.args.device.type == "cuda",
            )
        return self.optimizer

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(*args, **kwargs)
        # DeepSpeed's half precision casts buffers with the weights; rotary positions must not be rounded.
        buffers = {name: buffer.clone() for name, buffer in self.objective.named_buffers()}
        refused = "--deepspeed: DeepSpeed refuses this configuration, or the checkpoint to resume from"
        with wrap_errors(ConfigError, refused, ValueError, AssertionError):
            prepared = super()._prepare_for_training(*args, **kwargs)
        for name, buffer in buffers.items():
            module, _, leaf = name.rpartition(".")
            self.objective.get_submodule(module)._buffers[leaf] = buffer.to(self.args.device)
        return prepared

    def on_optimizer_gradients(self) -> None:
        """Measure the gradient of each term alone, on the last micro-batch of a step that will be logged."""
        if not self.term_recipes or self._last is None:
            return
        batch, targets, counts = (self._last[name] for name in ("batch", "targets", "counts"))
        with self.compute_loss_context_manager():
            losses = {
                name: self.objective(batch, targets, counts, recipe)["loss"] for name, recipe in self.term_recipes.items()
            }
        self._gradient_norms = term_gradient_norms(losses, self.objective.parameters())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms since the last line, write the line to ``metrics.jsonl``, and print the warnings that are due."""
        if "loss" in logs:
            norms = {f"gradient_norm/{name}": float(value) for name, value in self._gradient_norms.items()}
            self._gradient_norms = {}
            step = self.state.global_step
            reduce = self.processes.reduce if self.processes.world_size > 1 else None
            with explained_write_faults(self.metrics.path.parent, "a log line"):
                logs = self.metrics.line({**logs, **norms}, step=step, epoch=self.schedule.epoch(step), reduce=reduce)
            for warning in self.health_checks(logs) if self.processes.first else ():
                _log.warning("%s", warning)
        with explained_write_faults(self.metrics.path.parent, "a log line"):
            super().log(logs, start_time)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's hook after a step that is due: judge the student, log that, and end the run where none gets better."""
        step = self.state.global_step
        self.control.should_evaluate = False  # Trainer asks once more at the end of its epoch
        self.finite.check(wait=True)
        found = self.evaluation(self.model_wrapped, self.objective, self.compute_loss_context_manager, step=step)
        if found is None:  # a signal came: the run that goes on from here evaluates this step
            self.control.should_save = self.control.should_training_stop = True
            return {}
        figures, seconds = found
        self.metrics.leave_out(seconds)
        figures = {name: round(value, 10) for name, value in {**figures, "seconds": round(seconds, 3)}.items()}
        with explained_write_faults(self.metrics.path.parent, "a log line"):
            line = {"step": step, "epoch": round(self.schedule.epoch(step), 5)}
            self.metrics.write({**line, **{f"eval/{name}": value for name, value in figures.items()}})
            super().log({f"{EVAL}{name}": value for name, value in figures.items()})
        if self.evaluation.ended_early:
            self.control.should_training_stop = True
        return figures

    def evaluate_if_left(self) -> None:
        """After a resume: the step of the checkpoint, if a signal ended the run of before in its evaluation.

        Raises:
            Interrupted: a signal came again; the checkpoint is still that of the step.
            EndedEarlyError: nothing is left to train.
        """
        step = self.state.global_step
        if not self.evaluation.ended_early and self.evaluation.due(step, self.schedule.steps):
            self._evaluate()
            if self.evaluation.due(step, self.schedule.steps):
                signal = self.stop.signal_name or "a signal to another process"
                raise Interrupted(f"stopped by {signal} at step {step}; continue with --resume")
        if self.evaluation.ended_early:
            raise EndedEarlyError

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save once all losses so far are known to be finite; mark the checkpoint complete when every process has written."""
        self.finite.check(wait=True)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with sealed_or_removed(folder, first=self.processes.first):
            if self.lock is not None:
                self.lock.check()
            super()._save_checkpoint(model, trial)
            totals = self.metrics.state_dict(self.processes.reduce if self.processes.world_size > 1 else None)
            self.processes.wait()
            if self.processes.first:
                state = {"metrics": totals, "processes": self.processes.world_size, "warnings": self.health_checks.reported}
                state["evaluation"] = self.evaluation.state_dict()
                mark_complete(folder, state)
                remove_oldest(folder.parent, keep=self.save_total_limit)
