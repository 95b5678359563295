"""transformers' Trainer around the objective: order, parameter groups, metrics, checkpoints."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignkd.cache_store.storage import LocalStorage
from alignkd.objective import TERMS, Objective, term_weights
from alignkd.pipeline.interrupt import StopFlag, leave_signals_to_parent
from alignkd.pipeline.loader import SHARDS_OPEN, MisalignedRow, TrainingSet
from alignkd.pipeline.optimizers import OptimizerName, make_optimizer
from alignkd.pipeline.order import EpochSampler
from alignkd.pipeline.progress import Bar
from alignkd.pipeline.provenance import peak_memory_bytes


class DistillTrainer(Trainer):  # type: ignore[misc]
    """Trainer whose model is an :class:`~alignkd.objective.Objective` and whose order is :class:`EpochSampler`'s."""

    def __init__(
        self,
        objective: Objective,
        arguments: TrainingArguments,
        data: TrainingSet,
        *,
        projector_learning_rate: float | None,
        optimizer_name: OptimizerName,
        muon_learning_rate: float,
        metrics_path: Path,
        callbacks: list[TrainerCallback],
    ) -> None:
        self.data = data
        self.projector_learning_rate = projector_learning_rate
        self.optimizer_name, self.muon_learning_rate = optimizer_name, muon_learning_rate
        self.metrics = _Metrics(objective, metrics_path)
        super().__init__(model=objective, args=arguments, train_dataset=data, data_collator=data.collate, callbacks=callbacks)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return EpochSampler(self.data.shard_of_sample, seed=self.args.seed, window=SHARDS_OPEN)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The loader that accelerate shards over processes; batches move to the device in :meth:`_prepare_inputs`."""
        loader = DataLoader(
            self.data,
            batch_size=self.args.train_batch_size,
            sampler=self._get_train_sampler(),
            collate_fn=self.data.collate,
            num_workers=self.args.dataloader_num_workers,
            worker_init_fn=leave_signals_to_parent,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=self.args.dataloader_num_workers > 0,
        )
        prepared: DataLoader[Any] = self.accelerator.prepare_data_loader(loader, device_placement=False)
        return prepared

    def _prepare_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        for failure in inputs["failures"]:
            if failure.fatal:
                raise MisalignedRow(failure.reason)
            self.data.rejects.add(failure.sample_id, failure.reason, key=failure.key)
        if inputs["batch"] is None:
            return {"batch": None, "targets": None}
        return {name: inputs[name].to(self.args.device) for name in ("batch", "targets")}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The weighted sum of terms; each term is kept on the device until the next log line."""
        if inputs["batch"] is None:  # every sample of it was rejected: the step is made without a gradient
            nothing = next(p for p in model.parameters() if p.requires_grad).sum() * 0.0
            return (nothing, {}) if return_outputs else nothing
        outputs = model(**inputs)
        self.metrics.add(outputs, inputs["batch"])
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Over what trains: the student without its tower, and the adapters; the projector may have its own rate."""
        if self.optimizer is None:  # type: ignore[has-type]
            projector = set(map(id, self.metrics.objective.student.model.multi_modal_projector.parameters()))
            rate = self.projector_learning_rate
            self.optimizer = make_optimizer(
                self.optimizer_name,
                self.metrics.objective.named_parameters(),
                learning_rate=self.args.learning_rate,
                muon_learning_rate=self.muon_learning_rate,
                weight_decay=self.args.weight_decay,
                own_rates={} if rate is None else dict.fromkeys(projector, rate),
                fused=self.args.device.type == "cuda",
            )
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms since the last line, and write the line to ``metrics.jsonl``."""
        if "loss" in logs:
            logs = self.metrics.line(logs, self.state)
        super().log(logs, start_time)


class _Metrics:
    """Sums of terms between two log lines, and the file they go to."""

    def __init__(self, objective: Objective, path: Path) -> None:
        self.objective, self.path = objective, path
        self.samples = self.tokens = 0
        self._sums: dict[str, torch.Tensor] = {}
        self._batches = 0
        self._started = time.perf_counter()
        self._seconds_before = 0.0

    def state_dict(self) -> dict[str, float]:
        """Running totals, for a checkpoint."""
        seconds = self._seconds_before + time.perf_counter() - self._started
        return {"samples": self.samples, "tokens": self.tokens, "seconds": seconds}

    def resume(self, state: Mapping[str, float], step: int) -> None:
        """Go on from a checkpoint's totals (none: from the start); lines of steps that are run again are dropped."""
        self.samples, self.tokens = int(state.get("samples", 0)), int(state.get("tokens", 0))
        self._seconds_before = float(state.get("seconds", 0.0))
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        # A kill can cut the last line short; it belongs to a step that is run again.
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        self.path.write_text("".join(line + "\n" for line in kept))

    def add(self, outputs: Mapping[str, torch.Tensor], batch: Any) -> None:
        """Count a batch; nothing is copied to the host here."""
        self._batches += 1
        self.samples += batch.samples
        self.tokens += batch.input_ids_BS.numel()
        for name in TERMS:
            if name in outputs:
                value = outputs[name].float()
                self._sums[name] = self._sums[name] + value if name in self._sums else value

    def line(self, logs: dict[str, float], state: TrainerState) -> dict[str, float]:
        """The log line with every term, unweighted and weighted; also appended to the file."""
        weights = term_weights(self.objective.recipe)
        terms = {name: float(value) / max(self._batches, 1) for name, value in self._sums.items()}
        self._sums, self._batches = {}, 0
        totals = self.state_dict()
        line = {
            "step": state.global_step,
            "epoch": round(float(state.epoch or 0.0), 5),
            "samples": self.samples,
            "tokens": self.tokens,
            "seconds": round(totals["seconds"], 3),
            **logs,
            **terms,
            **{f"weighted/{name}": weights[name] * value for name, value in terms.items()},
            "peak_memory_bytes": peak_memory_bytes(),
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return line


class RunCallback(TrainerCallback):  # type: ignore[misc]
    """Moves the bar, and asks for a checkpoint and a stop when a signal came."""

    def __init__(self, progress: Bar, stop: StopFlag) -> None:
        self.progress, self.stop = progress, stop

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        """Trainer's hook after an optimizer step."""
        self.progress.advance()
        if self.stop:
            control.should_save = control.should_training_stop = True
        return control

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        """Trainer's hook after a log line."""
        if logs and "loss" in logs:
            self.progress.note(f"loss {logs['loss']:.4f}")


class MetricsCheckpoint(TrainerCallback):  # type: ignore[misc]
    """Keeps the running totals beside each checkpoint."""

    NAME = "metrics_state.json"

    def __init__(self) -> None:
        self.metrics: _Metrics | None = None

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Trainer's hook after a checkpoint."""
        assert self.metrics is not None
        folder = LocalStorage(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        # Whole or not at all: this file is what says that the checkpoint is complete.
        folder.delete(self.NAME)
        folder.write(self.NAME, json.dumps(self.metrics.state_dict()).encode())
