"""Trainer's hooks: the progress bar, a checkpoint and a stop after a signal, gradient norms before a log line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from alignkd.pipeline.runtime.progress import ProgressBar

if TYPE_CHECKING:
    from alignkd.pipeline.training.trainer import DistillTrainer


class RunCallback(TrainerCallback):  # type: ignore[misc]
    """Acts for one trainer, whose ``callback.trainer`` is set once it exists."""

    def __init__(self, progress: ProgressBar) -> None:
        self.progress = progress
        self.trainer: DistillTrainer | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The model is ready, at the step of a checkpoint where there is one."""
        assert self.trainer is not None
        self.trainer.evaluate_if_left()

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The gradients of a step are complete."""
        assert self.trainer is not None
        step = state.global_step + 1
        if step in (1, state.max_steps) or step % args.logging_steps == 0:
            self.trainer.on_optimizer_gradients()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        """The optimizer has made its step."""
        assert self.trainer is not None
        self.progress.advance()
        if state.global_step >= state.max_steps:
            control.should_log = True  # the summary at the end is about the last steps
        alone = self.trainer.processes.world_size == 1
        if self.trainer.stop_agreed or (alone and self.trainer.stop):
            control.should_save = control.should_training_stop = True
        elif self.trainer.evaluation.due(state.global_step, state.max_steps):
            control.should_evaluate = True
        return control

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        """A log line was written; Trainer's own summary at the end, which has no loss, is not one."""
        if logs and "loss" in logs:
            rate, padding = f"{logs['tokens_per_second']:,.0f} tokens/s", f"{logs['padding_share']:.0%} padding"
            self.progress.note(f"loss {logs['loss']:.4f}, {rate}, {padding}")
