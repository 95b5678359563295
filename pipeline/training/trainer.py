"""transformers' Trainer around the objective: order, counts of a whole step, parameter groups, what is logged and watched."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignkd.inputs.batch import Counts
from alignkd.losses.gradient_norms import term_gradient_norms
from alignkd.losses.recipes import one_term_recipes
from alignkd.losses.uniformity import attention_contrast
from alignkd.objective import Objective, Outcome
from alignkd.pipeline.config.distill import OptimizerName
from alignkd.pipeline.feeding.batch_loader import TrainingLoader
from alignkd.pipeline.feeding.dataset import TrainingExample, TrainingSet
from alignkd.pipeline.feeding.order import BatchOrder, StepSampler
from alignkd.pipeline.feeding.row_checks import MisalignedRowError
from alignkd.pipeline.runtime.processes import Processes
from alignkd.pipeline.runtime.progress import Bar, console
from alignkd.pipeline.runtime.signals import StopFlag
from alignkd.pipeline.training.checkpoints import seal
from alignkd.pipeline.training.health_checks import FiniteCheck, Watch
from alignkd.pipeline.training.metrics import PRECISION, Metrics
from alignkd.pipeline.training.optimizers import make_optimizer


@dataclass(frozen=True)
class Schedule:
    """The steps of a run, of ``per_step`` micro-batches over all processes, and the order that says what each of them takes."""

    order: BatchOrder
    steps: int
    per_step: int

    def epoch(self, step: int) -> float:
        """Passes over the data after a step."""
        epoch = 0
        while step > (steps := self.order.steps_per_epoch(epoch, self.per_step)):
            epoch, step = epoch + 1, step - steps
        return epoch + step / steps


@dataclass(frozen=True)
class OptimizerSettings:
    """Which optimizer, and the learning rates that are not the run's own."""

    name: OptimizerName
    muon_learning_rate: float
    projector_learning_rate: float | None


class DistillTrainer(Trainer):  # type: ignore[misc]
    """Trainer whose model is an :class:`~alignkd.objective.Objective` and whose order is :class:`StepSampler`'s.

    To Trainer the whole run is one epoch of steps: where a resumed run goes on is arithmetic, and no batch is read to be
    skipped. Terms and gradients are averaged over the whole step, whatever processes and batches it is split into.
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
        term_gradients: bool = False,
        callbacks: list[TrainerCallback],
    ) -> None:
        self.objective, self.data, self.processes = objective, data, processes
        self.schedule, self.done = schedule, done
        self.optimizer_settings = optimizer
        self.metrics, self.watch, self.finite = metrics, Watch(objective.recipe), FiniteCheck()
        self.stop, self.stop_agreed = stop, False
        self.term_recipes = one_term_recipes(objective.recipe) if term_gradients else {}
        self._gradient_norms: dict[str, torch.Tensor] = {}
        self._last: Mapping[str, Any] | None = None
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
        """This process's batches; they move to the device in :meth:`_prepare_inputs`."""
        return TrainingLoader(
            self.data,
            self._get_train_sampler(),
            workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            seed=self.args.seed,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Counts]:
        """The batches of a step, and the counts of the whole step over all processes."""
        started = time.perf_counter()
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        self.metrics.waited(time.perf_counter() - started)
        for inputs in batches:
            for failure in inputs["failures"]:
                if failure.fatal:
                    raise MisalignedRowError(failure.reason)
                self.data.rejects.add(failure.sample_id, failure.reason, key=failure.key)
        mine = [
            inputs["targets"].mask_to_targets(inputs["batch"]).counts() for inputs in batches if inputs["batch"] is not None
        ]
        sums = self.processes.sum(
            [
                sum(counts.answers for counts in mine),
                sum(counts.with_text_after_image for counts in mine),
                sum(counts.with_image for counts in mine),
                sum(counts.samples for counts in mine),
                float(bool(self.stop)),
            ]
        )
        # A process alone looks at the flag when the step is done; several must have agreed on it before.
        self.stop_agreed = self.processes.world_size > 1 and sums[-1] > 0
        answers, with_text_after_image, with_image, samples, _ = sums
        return batches, Counts(
            answers=answers,
            with_text_after_image=with_text_after_image,
            with_image=with_image,
            samples=samples,
            processes=self.processes.world_size,
        )

    def _prepare_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        if inputs["batch"] is None:
            return {"batch": None, "targets": None, "ids": []}
        moved = {name: inputs[name].to(self.args.device) for name in ("batch", "targets")}
        return {**moved, "ids": inputs["ids"]}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The weighted sum of terms; each term is kept on the device until the next log line."""
        assert not return_outputs
        counts: Counts = num_items_in_batch
        if inputs["batch"] is None:
            return self._idle(model, counts)
        self.finite.check()
        found: Outcome = model(batch=inputs["batch"], targets=inputs["targets"], counts=counts)
        self._note(found, inputs, counts)
        return found["loss"]

    def _note(self, found: Outcome, inputs: Mapping[str, Any], counts: Counts) -> None:
        batch = inputs["batch"]
        self.finite.add(found["bad_B"], inputs["ids"], step=self.state.global_step + 1)
        outputs = {"loss": found["loss"].detach() / counts.processes, **found["terms"]}
        outputs |= {PRECISION.format(name): precision for name, precision in found["precisions"].items()}
        if found["attention_BHTV"] is not None:
            compared = inputs["targets"].mask_to_targets(batch)
            masks = compared.text_mask_BT, compared.vision_mask_BV
            outputs["attention_contrast"] = attention_contrast(found["attention_BHTV"], *masks)
        tokens, answers = batch.input_ids_BS.numel(), batch.answer_ids_A.numel()
        self.metrics.add(outputs, samples=batch.samples, tokens=tokens, answers=answers)
        self._last = {**inputs, "counts": counts}

    def _idle(self, model: nn.Module, counts: Counts) -> torch.Tensor:
        """A batch without a usable sample: the step is made without a gradient from it.

        Where processes average gradients, a sample that counts nothing is run all the same, as all must meet in every layer.
        """
        if self.processes.world_size == 1:
            return next(p for p in model.parameters() if p.requires_grad).sum() * 0.0
        stand_in = self._prepare_inputs(self._stand_in())
        loss: torch.Tensor = model(batch=stand_in["batch"], targets=stand_in["targets"], counts=counts)["loss"]
        return loss * 0.0

    def _stand_in(self) -> dict[str, Any]:
        for position in range(len(self.data)):
            item = self.data[position]
            if isinstance(item, TrainingExample):
                return self.data.collate([item])
        raise ValueError(f"no sample of {self.data.samples.path} can be used; see the reasons above")

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Over what trains: the student without its tower, and the adapters; the projector may have its own rate."""
        if self.optimizer is None:  # type: ignore[has-type]
            settings = self.optimizer_settings
            projector = set(map(id, self.objective.vlm.projector.parameters()))
            rate, learned = settings.projector_learning_rate, self.objective.learned_weights
            learned_ids = set() if learned is None else set(map(id, learned.parameters()))
            own_rates = {} if rate is None else dict.fromkeys(projector, rate)
            self.optimizer = make_optimizer(
                settings.name,
                self.objective.named_parameters(),
                learning_rate=self.args.learning_rate,
                muon_learning_rate=settings.muon_learning_rate,
                weight_decay=self.args.weight_decay,
                own_rates=own_rates | dict.fromkeys(learned_ids, self.objective.recipe.weighting_learning_rate),
                undecayed=learned_ids,
                fused=self.args.device.type == "cuda",
            )
        return self.optimizer

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(*args, **kwargs)
        # DeepSpeed's half precision casts buffers with the weights; rotary positions must not be rounded.
        buffers = {name: buffer.clone() for name, buffer in self.objective.named_buffers()}
        prepared = super()._prepare_for_training(*args, **kwargs)
        for name, buffer in buffers.items():
            module, _, leaf = name.rpartition(".")
            self.objective.get_submodule(module)._buffers[leaf] = buffer.to(self.args.device)
        return prepared

    def on_optimizer_gradients(self) -> None:
        """Measure each term's own gradient on the last batch of a step that will be logged."""
        if not self.term_recipes or self._last is None:
            return
        batch, targets, counts = (self._last[name] for name in ("batch", "targets", "counts"))
        with self.compute_loss_context_manager():
            losses = {
                name: self.objective(batch, targets, counts, recipe)["loss"] for name, recipe in self.term_recipes.items()
            }
        self._gradient_norms = term_gradient_norms(losses, self.objective.parameters())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms since the last line, write the line to ``metrics.jsonl``, and warn where it asks for it."""
        if "loss" in logs:
            norms = {f"gradient_norm/{name}": float(value) for name, value in self._gradient_norms.items()}
            self._gradient_norms = {}
            step = self.state.global_step
            reduce = self.processes.reduce if self.processes.world_size > 1 else None
            logs = self.metrics.line({**logs, **norms}, step=step, epoch=self.schedule.epoch(step), reduce=reduce)
            for warning in self.watch(logs) if self.processes.first else ():
                console.print(f"warning: {warning}", style="yellow", highlight=False, soft_wrap=True)
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A whole checkpoint of weights that are numbers, sealed when every process has written its part."""
        self.finite.check(wait=True)
        super()._save_checkpoint(model, trial)
        totals = self.metrics.state_dict(self.processes.reduce if self.processes.world_size > 1 else None)
        self.processes.wait()
        if self.processes.first:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            seal(folder, {"metrics": totals, "processes": self.processes.world_size})

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Any] | None = None) -> None:
        """Weights that two modules share, as an output head that is the embedding: once, as safetensors wants it."""
        super()._save(output_dir, once_each(self.model.state_dict() if state_dict is None else state_dict))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Weights of a checkpoint are all there: those that :meth:`_save` left out came with the first of their names.

        Raises:
            ValueError: others are missing, or are not known.
        """
        odd = [*(set(load_result.missing_keys) & set(once_each(self.model.state_dict()))), *load_result.unexpected_keys]
        if odd:
            names = ", ".join(sorted(odd)[:4])
            raise ValueError(f"--resume: the checkpoint does not hold this student's weights: {names}; choose another --out")


def once_each(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state without the further names of tensors that have several."""
    kept: dict[Any, str] = {}
    for name, tensor in state.items():
        kept.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name, name)
    return {name: state[name] for name in kept.values()}


class RunCallback(TrainerCallback):  # type: ignore[misc]
    """Moves the bar, asks for a checkpoint and a stop when a signal came, and for gradient norms before a log line."""

    def __init__(self, progress: Bar) -> None:
        self.progress = progress
        self.trainer: DistillTrainer | None = None

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Trainer's hook when the gradients of a step are there."""
        assert self.trainer is not None
        step = state.global_step + 1
        if step == 1 or step % args.logging_steps == 0:
            self.trainer.on_optimizer_gradients()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        """Trainer's hook after an optimizer step."""
        assert self.trainer is not None
        self.progress.advance()
        alone = self.trainer.processes.world_size == 1
        if self.trainer.stop_agreed or (alone and self.trainer.stop):
            control.should_save = control.should_training_stop = True
        return control

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        """Trainer's hook after a log line."""
        if logs and "loss" in logs:
            self.progress.note(f"loss {logs['loss']:.4f}, {logs['tokens_per_second']:,.0f} tokens/s")
