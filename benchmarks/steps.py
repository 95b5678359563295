"""Training steps of each kind on the same batch: what they take in time and memory.

``plain``: transformers' own forward pass and loss, logits of every position. ``sft``: plain fine-tuning by our objective.
``logits-only``: reverse KL from the default sketch. ``align-kd, slice``: all terms, attention and vision tokens from the
teacher's slice, which shares the student's tower. ``align-kd, cached``: all terms from a default cache, attention of every
head. ``align-kd, online``: all terms from the whole teacher in the loop, which shares the tower. Targets are as they are
stored until they are in the step.

A step: batch and targets to the device, forward, backward, AdamW as stage two makes it, and the contrast of attention
that stage two watches. Weights are float32, under autocast for 16 bits.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch
from shapes import STUDENT, TEACHER, make_logit_codec, make_slice, make_vlm, scaled, stored_targets
from torch.profiler import ProfilerActivity, profile
from transformers.utils.generic import maybe_autocast

from alignkd.capture.online_teacher import OnlineTeacher
from alignkd.inputs.batch import Batch
from alignkd.losses.recipes import get_recipe
from alignkd.losses.uniformity import attention_contrast
from alignkd.models.vlm import Vlm
from alignkd.objective import Objective, TargetSource, TeacherShape
from alignkd.pipeline.training.optimizers import make_optimizer
from alignkd.targets.batch_targets import Targets
from alignkd.targets.logits import LogitCodec

KINDS = ("plain", "sft", "logits-only", "align-kd, slice", "align-kd, cached")
ONLINE = "align-kd, online"
# So deep that its decoder has 3.9 times the parameters of the student's.
ONLINE_SHAPE = {**TEACHER, "num_hidden_layers": 24}
_STORED: dict[str, tuple[str, ...]] = {
    "logits-only": ("logits",),
    "align-kd, slice": ("logits",),
    "align-kd, cached": ("attention", "vision", "logits"),
}


@dataclass(frozen=True)
class Setting:
    """Sizes and the device of a measurement."""

    scale: int
    device: str
    dtype: torch.dtype

    @property
    def on_cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"


class Steps:
    """Steps of one kind with an optimizer of its own; several may train one student in turns."""

    def __init__(self, kind: str, student: Vlm, setting: Setting, overrides: Mapping[str, str] | None = None) -> None:
        """``overrides``: of fields of the recipe."""
        self.kind, self.student, self.setting = kind, student, setting
        recipe = get_recipe(kind.partition(",")[0] if kind != "plain" else "sft", overrides)
        source, codec = self._teacher()
        shape = scaled(TEACHER, setting.scale)
        teacher = TeacherShape(shape["num_attention_heads"], shape["hidden_size"])
        self.objective = Objective(student, recipe, teacher, source, codec).train()
        if codec is not None:
            codec.to(setting.device)
        self.optimizer = make_optimizer(
            "adamw",
            self.objective.named_parameters(),
            learning_rate=1e-6,
            weight_decay=0.0,
            muon_learning_rate=0.0,
            own_rates={},
            fused=setting.on_cuda,
        )

    def _teacher(self) -> tuple[TargetSource | None, LogitCodec | None]:
        setting = self.setting
        if self.kind == ONLINE:
            online = OnlineTeacher(_with_tower_of(self.student, setting), self.student)
            assert online.shares_tower
            return online, online.logit_codec
        source = make_slice(setting.scale, setting.device, setting.dtype) if self.kind == "align-kd, slice" else None
        return source, _logit_codec() if self.kind in _STORED else None

    def targets(self, batch: Batch) -> Targets:
        """Those of this kind, on the host."""
        if self.kind not in _STORED:
            return Targets()
        made = stored_targets(batch, self.setting.scale, _STORED[self.kind], _logit_codec())
        return made.pin_memory() if self.setting.on_cuda else made

    def step(self, batch: Batch, targets: Targets, *, update: bool = True) -> None:
        """Without the ``update``, forward and backward alone."""
        counts, device = batch.counts(), self.setting.device
        batch, targets = batch.to(device), targets.to(device)
        with maybe_autocast(torch.device(device).type, self.setting.dtype, enabled=self.setting.dtype != torch.float32):
            if self.kind == "plain":
                loss = _plain_loss(self.student, batch)
            else:
                found = self.objective(batch, targets, counts)
                loss = found["loss"]
                if found["attention_BHTV"] is not None:
                    attention_contrast(found["attention_BHTV"], batch.text_mask_BT, batch.vision_mask_BV)
                del found
        loss.backward()
        if update:
            self.optimizer.step()
        self.optimizer.zero_grad()


@cache
def _logit_codec() -> LogitCodec:
    return make_logit_codec()


def _with_tower_of(student: Vlm, setting: Setting) -> Vlm:
    """The online teacher; it computes in 16 bits where the student's step does, and has the student's tower in them."""
    teacher = make_vlm(ONLINE_SHAPE, setting.scale, setting.device, setting.dtype)
    teacher.tower.load_state_dict(student.tower.state_dict())
    return teacher


def _plain_loss(student: Vlm, batch: Batch) -> torch.Tensor:
    labels_BS = torch.full_like(batch.input_ids_BS, -100).flatten()
    labels_BS = labels_BS.index_copy(0, batch.answer_positions_A + 1, batch.answer_ids_A).view_as(batch.input_ids_BS)
    loss: torch.Tensor = student.model(
        input_ids=batch.input_ids_BS,
        attention_mask=batch.attention_mask_BS,
        pixel_values=batch.images,
        labels=labels_BS,
        use_cache=False,
    ).loss
    return loss


def with_features(student: Vlm, batch: Batch) -> Batch:
    """The batch as ``--cache-tower-features`` makes it: the frozen tower has run."""
    with torch.no_grad():
        return replace(batch, images=student.model.model.run_tower(batch.images.to(student.device)).cpu())


def seconds_in_turns(functions: Mapping[str, Callable[[], None]], rounds: int, *, on_cuda: bool) -> dict[str, list[float]]:
    """Seconds of each function in each round; a round before them warms up."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            spent = _seconds(function, on_cuda)
            if number:
                taken[name].append(spent)
    return taken


def _seconds(function: Callable[[], None], on_cuda: bool) -> float:
    if on_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if on_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def median_ratio(mine: list[float], theirs: list[float]) -> float:
    """Of rounds, each against its own neighbour."""
    return statistics.median(a / b for a, b in zip(mine, theirs, strict=True))


def peak_bytes(function: Callable[[], None], *, on_cuda: bool) -> int:
    """Bytes of all tensors of this process at the peak of a call, those that were there before included."""
    gc.collect()
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated()
    before = _live_bytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]).cumsum(dim=0)
    return before + int(live.max())


def _live_bytes() -> int:
    tensors = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def alone(kind: str, setting: Setting) -> Steps:
    """Steps with a student of their own, for measuring memory: nothing else should be kept while these live."""
    gc.collect()
    if setting.on_cuda:
        torch.cuda.empty_cache()
    return Steps(kind, make_vlm(STUDENT, setting.scale, setting.device), setting)
