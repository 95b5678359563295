"""A forward pass of the teacher over a batch (two, where advantages are asked for), and the copy of its targets to the host.

Shapes: H teacher heads, T text rows, V vision columns, D teacher width, A answers, J draws, N vocabulary, L ids.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from alignkd.cache_store.rows.spec import FieldSpec
from alignkd.capture.advantage import advantages
from alignkd.capture.attention import capture
from alignkd.inputs.batch import Batch, ModelInput
from alignkd.models.vlm import Vlm
from alignkd.pipeline.cache_io.logits import logit_fields
from alignkd.pipeline.cache_io.targets import ADVANTAGE_FIELD, row_fields
from alignkd.pipeline.config.cache_layout import ADVANTAGE, attention_field, attention_layer
from alignkd.pipeline.config.targets import TargetSettings
from alignkd.pipeline.runtime.host_copy import copy_to_host
from alignkd.pipeline.stage_one.calibrate import answers_at_once
from alignkd.pipeline.stage_one.finite import FiniteMarks, finite_logits, finite_rows, finite_targets
from alignkd.targets.logits import LogitCodec


def draw_numbers(keys: Sequence[str], answers_of_sample: Sequence[int], draws: int) -> torch.Tensor:
    """Random numbers in (0, 1], ``[A, J]``. Those of a sample depend only on its key, not on its batch."""
    parts = [
        1 - np.random.Generator(np.random.Philox(key=int(key, 16))).random((answers, draws), np.float32)
        for key, answers in zip(keys, answers_of_sample, strict=True)
    ]
    return torch.from_numpy(np.concatenate([np.empty((0, draws), np.float32), *parts]))


_OF_INPUT: dict[str, Callable[[ModelInput], np.ndarray]] = {
    "input_ids": lambda given: given.input_ids.astype(np.int32),
    "labels": lambda given: given.labels.astype(np.int32),
    "spans": lambda given: given.spans.astype(np.int32),
    "regions": lambda given: given.regions_R8,
}


@dataclass(frozen=True)
class TeacherOutput:
    """Targets of a batch that are being copied to the host. :meth:`values` waits for the copy, the next batch need not."""

    tensors: dict[str, torch.Tensor]
    arrived: torch.cuda.Event | None
    batch: Batch
    inputs: Sequence[ModelInput]
    answer_fields: tuple[FieldSpec, ...] = ()
    input_fields: tuple[str, ...] = ("input_ids", "labels")
    finite: FiniteMarks | None = None

    def finite_samples(self) -> list[bool]:
        """Whether the teacher's pass over each sample gave finite numbers alone; waits for the copy."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return [True] * len(self.inputs) if self.finite is None else self.finite.of_samples(self.batch)

    def values(self) -> list[dict[str, np.ndarray]]:
        """The values of each sample's row, unpadded; those of a sample that is not finite mean nothing."""
        if self.arrived is not None:
            self.arrived.synchronize()
        arrays = {name: tensor.numpy() for name, tensor in self.tensors.items()}
        rows, columns = self.batch.text_mask_BT.sum(1).tolist(), self.batch.vision_mask_BV.sum(1).tolist()
        owners = self.batch.answer_samples_A.numpy()
        return [
            {name: _OF_INPUT[name](sample) for name in self.input_fields}
            | self._values(arrays, i, rows[i], columns[i], owners == i)
            for i, sample in enumerate(self.inputs)
        ]

    def _values(
        self, arrays: Mapping[str, np.ndarray], i: int, rows: int, columns: int, mine: np.ndarray
    ) -> dict[str, np.ndarray]:
        values = {}
        for name in filter(lambda name: attention_layer(name) is not None, arrays):
            values[name] = arrays[name][i, :, :rows, :columns]
        if "vision_tokens" in arrays:
            values["vision_tokens"] = arrays["vision_tokens"][i, :columns]
        for answer_field in self.answer_fields:
            values[answer_field.name] = arrays[answer_field.name][mine].astype(answer_field.numpy_dtype)
        return values


@torch.inference_mode()
def run_teacher(
    teacher: Vlm,
    batch: Batch,
    inputs: Sequence[ModelInput],
    settings: TargetSettings,
    codec: LogitCodec | None = None,
    keys: Sequence[str] = (),
) -> TeacherOutput:
    """Run the teacher over a batch on the host, without waiting for the device.

    ``codec`` encodes the logits, if they are among the targets. ``keys`` of the samples seed its draws, if it draws.
    """
    of_input = tuple(field.name for field in row_fields(settings, teacher.vocabulary) if field.name in _OF_INPUT)
    if not settings.targets:  # stage two computes all targets from the teacher's slice
        return TeacherOutput({}, None, batch, inputs, input_fields=of_input)
    on_device = batch.to(teacher.device)
    attention = "attention" in settings.targets
    captured = capture(teacher, on_device, attention=attention, layers=settings.attention_layers)
    tensors = {
        attention_field(layer): found.mean(dim=1, keepdim=True) if settings.attention == "mean" else found
        for layer, found in captured.attention.items()
    }
    if "vision" in settings.targets:
        tensors["vision_tokens"] = captured.vision_BVD.float()
    marks = {"samples": finite_targets(tensors, on_device), "answers": finite_rows(captured.hidden_AD)}
    fields: tuple[FieldSpec, ...] = ()
    if "logits" in settings.targets:
        assert codec is not None
        uniform_AJ = _uniform(batch, keys, codec.settings.draws) if codec.kind == "sampled" else None
        encoded, marks["answers"] = _encode_answers(
            teacher, codec, captured.hidden_AD, on_device.answer_ids_A, uniform_AJ, marks["answers"]
        )
        tensors |= encoded
        fields = logit_fields(codec.settings, teacher.vocabulary)
    if ADVANTAGE in settings.targets:
        advantage_A = advantages(teacher, on_device, captured.hidden_AD)
        marks["answers"] = marks["answers"] & advantage_A.isfinite()
        tensors[ADVANTAGE], fields = advantage_A, (*fields, ADVANTAGE_FIELD)
    # The marks come with the targets: the device is not asked for each sample whether its numbers are finite.
    host, arrived = copy_to_host(tensors | {f"finite {name}": mark for name, mark in marks.items()})
    finite = FiniteMarks(host.pop("finite samples"), host.pop("finite answers"))
    return TeacherOutput(host, arrived, batch, inputs, fields, of_input, finite)


def _encode_answers(
    teacher: Vlm,
    codec: LogitCodec,
    hidden_AD: torch.Tensor,
    labels_A: torch.Tensor,
    uniform_AJ: torch.Tensor | None,
    finite_A: torch.Tensor,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The fields of all answers, and which have finite logits; logits are computed a chunk of answers at a time.

    ``finite_A``: answers with finite hidden states. The others are encoded as zeros: codecs need not know them.
    """
    chunk, parts, marks = answers_at_once(teacher), [], []
    hidden_AD = hidden_AD.masked_fill(~finite_A[:, None], 0)
    uniform_AJ = hidden_AD.new_empty(len(hidden_AD), 0) if uniform_AJ is None else uniform_AJ.to(teacher.device)
    for start in range(0, max(len(hidden_AD), 1), chunk):
        part = slice(start, start + chunk)
        logits_AN = teacher.head(hidden_AD[part])[:, : codec.settings.vocabulary]
        marks.append(finite_logits(logits_AN))
        logits_AN.masked_fill_(~marks[-1][:, None], 0)
        parts.append(codec.encode(hidden_AD[part], logits_AN, labels_A[part], uniform_AJ[part]))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, finite_A & torch.cat(marks)


def _uniform(batch: Batch, keys: Sequence[str], draws: int) -> torch.Tensor:
    """Random numbers for each answer of a batch, whose answers are in the order of its samples."""
    counts = torch.bincount(batch.answer_samples_A, minlength=len(keys)).tolist()
    return draw_numbers(keys, counts, draws)
