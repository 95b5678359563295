"""Where the method meets the disk: captured targets to cache rows, and cache rows to a batch's targets.

Shapes: H teacher heads, T text rows, V vision columns, D teacher width, A answers, J draws, L ids.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from alignkd.batch import Batch, ModelInput
from alignkd.cache_store.codecs import get_codec
from alignkd.cache_store.row import Stored
from alignkd.cache_store.spec import FieldSpec
from alignkd.capture import capture
from alignkd.dequantise import Quantised
from alignkd.logits import LogitCodec, LogitSettings
from alignkd.models.vlm import Vlm
from alignkd.pipeline.logits_io import answers_at_once, draw_numbers, logit_fields
from alignkd.targets import Targets

TARGETS = ("attention", "vision", "logits")

QUANTISED = {"attention": "attention_BHTV", "vision_tokens": "vision_BVD"}
"""Fields that stay as they are stored until they are on the device, and what they become there."""

_OF_LAYER = "attention_"
"""Begins the fields of attention of other layers than the first."""


def attention_field(layer: int) -> str:
    """The field that holds the attention of one of the teacher's layers."""
    return f"{_OF_LAYER}{layer}" if layer else "attention"


def attention_layer(name: str) -> int | None:
    """The layer whose attention a field holds; None where it holds another target."""
    if name == "attention":
        return 0
    return int(name.removeprefix(_OF_LAYER)) if name.startswith(_OF_LAYER) else None


@dataclass(frozen=True)
class TargetSettings:
    """Which targets a cache holds, and how. ``attention_layers`` are the teacher's, of ``layers`` that it has.

    ``across``: rows say where their vision tokens lie and which characters their ids cover, for students of another make.
    """

    targets: tuple[str, ...] = TARGETS
    attention: str = "per-head"
    logits: LogitSettings = field(default_factory=LogitSettings)
    attention_codec: str = "sqrt8"
    vision_codec: str = "int8-rows"
    attention_layers: tuple[int, ...] = (0,)
    layers: int = 1
    across: bool = True

    def fingerprint(self) -> dict[str, Any]:
        """The part of a cache's fingerprint that these settings are."""
        others = "attention" in self.targets and self.attention_layers != (0,)
        return {
            **({"attention_layers": {"held": list(self.attention_layers), "of": self.layers}} if others else {}),
            "attention": self.attention if "attention" in self.targets else None,
            "vision": "vision" in self.targets,
            "logits": self.logits.fingerprint() if "logits" in self.targets else None,
        }

    def fields(self, vocabulary: int) -> tuple[FieldSpec, ...]:
        """The cache's fields: ids and labels always, what another make of student needs, then the targets."""
        fields = [FieldSpec("input_ids", ("L",), "int32", "exact"), FieldSpec("labels", ("L",), "int32", "exact")]
        if self.across:
            fields.append(FieldSpec("spans", ("L", "E"), "int32", "exact"))
        if self.across and {"attention", "vision"} & set(self.targets):
            fields.append(FieldSpec("regions", ("R", "C"), "float32", "exact", per_image=True))
        if "attention" in self.targets:
            names = [attention_field(layer) for layer in self.attention_layers]
            fields += [FieldSpec(name, ("H", "T", "V"), "float32", self.attention_codec) for name in names]
        if "vision" in self.targets:
            fields.append(FieldSpec("vision_tokens", ("V", "D"), "float32", self.vision_codec, per_image=True))
        if "logits" in self.targets:
            fields += logit_fields(self.logits, vocabulary)
        return tuple(fields)


_OF_INPUT: dict[str, Callable[[ModelInput], np.ndarray]] = {
    "input_ids": lambda given: given.input_ids.astype(np.int32),
    "labels": lambda given: given.labels.astype(np.int32),
    "spans": lambda given: given.spans.astype(np.int32),
    "regions": lambda given: given.regions_R8,
}


@dataclass(frozen=True)
class TeacherOutput:
    """Targets of a batch on their way to the host; ``values`` waits for them, so that the next batch may start before."""

    tensors: dict[str, torch.Tensor]
    arrived: torch.cuda.Event | None
    batch: Batch
    inputs: Sequence[ModelInput]
    answer_fields: tuple[FieldSpec, ...] = ()
    input_fields: tuple[str, ...] = ("input_ids", "labels")

    def values(self) -> list[dict[str, np.ndarray]]:
        """The values of each sample's row, unpadded."""
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
    """Run the teacher over a batch that lies on the host; nothing here waits for the device.

    ``codec`` is what encodes the logits, if they are wanted; ``keys`` of the samples are what it draws by, if it draws.
    """
    of_input = tuple(field.name for field in settings.fields(teacher.vocabulary) if field.name in _OF_INPUT)
    if not settings.targets:  # all that is wanted comes from the teacher's slice
        return TeacherOutput({}, None, batch, inputs, input_fields=of_input)
    on_device = batch.to(teacher.device)
    attention = "attention" in settings.targets
    captured = capture(teacher, on_device, attention=attention, layers=settings.attention_layers)
    tensors = {
        attention_field(layer): found.mean(dim=1, keepdim=True) if settings.attention == "mean" else found
        for layer, found in captured.layers.items()
    }
    if "vision" in settings.targets:
        tensors["vision_tokens"] = captured.vision_BVD.float()
    fields: tuple[FieldSpec, ...] = ()
    if "logits" in settings.targets:
        assert codec is not None
        uniform_AJ = _uniform(batch, keys, codec.settings.draws) if codec.kind == "sampled" else None
        tensors |= _encode_answers(teacher, codec, captured.hidden_AD, on_device.answer_ids_A, uniform_AJ)
        fields = logit_fields(codec.settings, teacher.vocabulary)
    host, arrived = _to_host(tensors)
    return TeacherOutput(host, arrived, batch, inputs, fields, of_input)


def _encode_answers(
    teacher: Vlm, codec: LogitCodec, hidden_AD: torch.Tensor, labels_A: torch.Tensor, uniform_AJ: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """All fields of all answers, a chunk of logits at a time."""
    chunk, parts = answers_at_once(teacher), []
    uniform_AJ = hidden_AD.new_empty(len(hidden_AD), 0) if uniform_AJ is None else uniform_AJ.to(teacher.device)
    for start in range(0, max(len(hidden_AD), 1), chunk):
        part = slice(start, start + chunk)
        logits_AN = teacher.head(hidden_AD[part])[:, : codec.settings.vocabulary]
        parts.append(codec.encode(hidden_AD[part], logits_AN, labels_A[part], uniform_AJ[part]))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _uniform(batch: Batch, keys: Sequence[str], draws: int) -> torch.Tensor:
    """Numbers for each answer of a batch, whose answers lie sample after sample."""
    counts = torch.bincount(batch.answer_samples_A, minlength=len(keys)).tolist()
    return draw_numbers(keys, counts, draws)


def _to_host(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.cuda.Event | None]:
    if not any(tensor.is_cuda for tensor in tensors.values()):
        return tensors, None
    host = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
        for name, tensor in tensors.items()
    }
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()
    return host, arrived


def collate_targets(stored: Sequence[Mapping[str, Stored]], batch: Batch) -> Targets:
    """Pad what the batch's samples have in the cache, in its order, to the batch's shapes; all of it stays as it is stored.

    Fields that the samples lack are absent.
    """
    quantised = {
        target: _pad([row[name] for row in stored], _padded_shape(name, stored, batch))
        for name, target in QUANTISED.items()
        if name in stored[0]
    }
    layers = {
        layer: _pad([row[name] for row in stored], _padded_shape(name, stored, batch))
        for name in stored[0]
        if (layer := attention_layer(name))
    }
    others = [name for name in stored[0] if name not in QUANTISED and attention_layer(name) is None]
    answers = {name: _concatenate([row[name] for row in stored]) for name in others}
    return Targets(quantised=quantised, quantised_answers=answers, quantised_layers=layers)


def _concatenate(stored: Sequence[Stored]) -> Quantised:
    """Answer after answer."""
    parts = {part: torch.from_numpy(np.concatenate([row.parts[part] for row in stored])) for part in stored[0].parts}
    return Quantised(stored[0].field.codec, (sum(row.shape[0] for row in stored), *stored[0].shape[1:]), parts)


def _padded_shape(name: str, stored: Sequence[Mapping[str, Stored]], batch: Batch) -> tuple[int, ...]:
    """``[H, T, V]`` or ``[V, D]`` of the batch."""
    text, vision = batch.text_rows_BT.shape[1], batch.vision_columns_BV.shape[1]
    if attention_layer(name) is not None:
        return max(row[name].shape[0] for row in stored), text, vision
    return vision, max(row[name].shape[1] for row in stored)


def _pad(stored: Sequence[Stored], shape: tuple[int, ...]) -> Quantised:
    """The parts of each sample in a corner of zeros: a codec decodes those to zeros."""
    field, parts = stored[0].field, {}
    for part, (part_shape, dtype) in get_codec(field.codec).layout(shape, field.numpy_dtype).items():
        padded = np.zeros((len(stored), *part_shape), dtype.newbyteorder("="))
        for i, row in enumerate(stored):
            values = row.parts[part]
            padded[i][tuple(slice(size) for size in values.shape)] = values
        parts[part] = torch.from_numpy(padded)
    return Quantised(field.codec, (len(stored), *shape), parts)
