"""Log lines for TensorBoard, with terms, weighted terms and shares in separate groups."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


EVAL = "eval_"
"""How transformers' trackers know figures of an evaluation by their names."""


class TensorBoard(TrainerCallback):  # type: ignore[misc]
    """Writes each log line's numbers as scalars into a folder, from the first process alone.

    transformers' own callback puts ``train/`` before every name, so TensorBoard, which groups by the text before the first
    slash, shows a single group. It also shows steps twice that were run again after a resume.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: SummaryWriter | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Open a file of events; events of steps that are run again are hidden."""
        if state.is_world_process_zero:
            from torch.utils.tensorboard import SummaryWriter

            _keep_writer_threads_quiet()
            self.writer = SummaryWriter(str(self.folder), purge_step=state.global_step + 1)

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Write a log line; Trainer's own summary at the end, which has no loss, is not one."""
        if self.writer is None or not logs or not ("loss" in logs or any(name.startswith(EVAL) for name in logs)):
            return
        for name, value in ((_grouped(name), value) for name, value in logs.items()):
            if isinstance(value, (int, float)) and name != "step":
                self.writer.add_scalar(name if "/" in name else f"train/{name}", value, state.global_step)
        self.writer.flush()

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Close the file."""
        if self.writer is not None:
            self.writer.close()
            self.writer = None


def _grouped(name: str) -> str:
    return f"eval/{name.removeprefix(EVAL)}" if name.startswith(EVAL) else name


def _keep_writer_threads_quiet() -> None:
    """TensorBoard raises what its thread could not write in the training process too: a traceback beside it helps nobody."""
    shown = threading.excepthook
    if getattr(shown, "is_quiet", False):
        return

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if type(arguments.thread).__name__ != "_AsyncWriterThread":
            shown(arguments)

    hook.is_quiet = True  # type: ignore[attr-defined]
    threading.excepthook = hook
