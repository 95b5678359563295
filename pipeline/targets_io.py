"""Where the method meets the disk: captured targets to cache rows, and cache rows to a batch's targets.

Shapes: H teacher heads, T text rows, V vision columns, D teacher width, A answers, K kept logits, L ids.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from alignkd.batch import Batch, ModelInput
from alignkd.cache_store.codecs import get_codec
from alignkd.cache_store.row import Stored
from alignkd.cache_store.spec import FieldSpec
from alignkd.capture import capture
from alignkd.dequantise import Quantised
from alignkd.models.vlm import Vlm
from alignkd.targets import Targets, renormalise, topk_targets

TARGETS = ("attention", "vision", "logits")

QUANTISED = {"attention": "attention_BHTV", "vision_tokens": "vision_BVD"}
"""Fields that stay as they are stored until they are on the device, and what they become there."""


@dataclass(frozen=True)
class TargetSettings:
    """Which targets a cache holds, and how."""

    targets: tuple[str, ...] = TARGETS
    attention: str = "per-head"
    top_k: int = 64
    temperature: float = 1.0
    attention_codec: str = "sqrt8"
    vision_codec: str = "int8-rows"

    def fingerprint(self) -> dict[str, Any]:
        """The part of a cache's fingerprint that these settings are."""
        logits = {"top_k": self.top_k, "temperature": self.temperature}
        return {
            "attention": self.attention if "attention" in self.targets else None,
            "vision": "vision" in self.targets,
            "logits": logits if "logits" in self.targets else None,
        }

    def fields(self, vocabulary: int) -> tuple[FieldSpec, ...]:
        """The cache's fields: ids and labels always, then the targets."""
        ids_dtype = "uint16" if vocabulary <= 2**16 else "uint32"
        fields = [FieldSpec("input_ids", ("L",), "int32", "exact"), FieldSpec("labels", ("L",), "int32", "exact")]
        if "attention" in self.targets:
            fields.append(FieldSpec("attention", ("H", "T", "V"), "float32", self.attention_codec))
        if "vision" in self.targets:
            fields.append(FieldSpec("vision_tokens", ("V", "D"), "float32", self.vision_codec, per_image=True))
        if "logits" in self.targets:
            fields.append(FieldSpec("topk_ids", ("A", "K"), ids_dtype, "exact"))
            fields.append(FieldSpec("topk_logprobs", ("A", "K"), "float32", "float16"))
            fields.append(FieldSpec("tail_logmass", ("A",), "float32", "exact"))
        return tuple(fields)


@dataclass(frozen=True)
class TeacherOutput:
    """Targets of a batch on their way to the host; ``values`` waits for them, so that the next batch may start before."""

    tensors: dict[str, torch.Tensor]
    arrived: torch.cuda.Event | None
    batch: Batch
    inputs: Sequence[ModelInput]
    ids_dtype: type[np.unsignedinteger[Any]]

    def values(self) -> list[dict[str, np.ndarray]]:
        """The values of each sample's row, unpadded."""
        if self.arrived is not None:
            self.arrived.synchronize()
        arrays = {name: tensor.numpy() for name, tensor in self.tensors.items()}
        rows, columns = self.batch.text_mask_BT.sum(1).tolist(), self.batch.vision_mask_BV.sum(1).tolist()
        owners = self.batch.answer_samples_A.numpy()
        return [
            {"input_ids": sample.input_ids.astype(np.int32), "labels": sample.labels.astype(np.int32)}
            | self._values(arrays, i, rows[i], columns[i], owners == i)
            for i, sample in enumerate(self.inputs)
        ]

    def _values(
        self, arrays: Mapping[str, np.ndarray], i: int, rows: int, columns: int, mine: np.ndarray
    ) -> dict[str, np.ndarray]:
        values = {}
        if "attention" in arrays:
            values["attention"] = arrays["attention"][i, :, :rows, :columns]
        if "vision_tokens" in arrays:
            values["vision_tokens"] = arrays["vision_tokens"][i, :columns]
        if "topk_ids" in arrays:
            values["topk_ids"] = arrays["topk_ids"][mine].astype(self.ids_dtype)
            values["topk_logprobs"] = arrays["topk_logprobs"][mine]
            values["tail_logmass"] = arrays["tail_logmass"][mine]
        return values


@torch.inference_mode()
def run_teacher(teacher: Vlm, batch: Batch, inputs: Sequence[ModelInput], settings: TargetSettings) -> TeacherOutput:
    """Run the teacher over a batch that lies on the host; nothing here waits for the device."""
    ids_dtype = np.uint16 if teacher.vocabulary <= 2**16 else np.uint32
    if not settings.targets:  # all that is wanted comes from the teacher's slice
        return TeacherOutput({}, None, batch, inputs, ids_dtype)
    captured = capture(teacher.model, batch.to(teacher.device), attention="attention" in settings.targets)
    tensors = {}
    if captured.attention_BHTV is not None:
        attention = captured.attention_BHTV
        tensors["attention"] = attention.mean(dim=1, keepdim=True) if settings.attention == "mean" else attention
    if "vision" in settings.targets:
        tensors["vision_tokens"] = captured.vision_BVD.float()
    if "logits" in settings.targets:
        tensors |= _topk(teacher, captured.hidden_AD, settings)
    host, arrived = _to_host(tensors)
    return TeacherOutput(host, arrived, batch, inputs, ids_dtype)


def _topk(teacher: Vlm, hidden_AD: torch.Tensor, settings: TargetSettings) -> dict[str, torch.Tensor]:
    chunk = max(1, 2**25 // teacher.vocabulary)
    parts = [
        topk_targets(teacher.model.lm_head(hidden_AD[start : start + chunk]), settings.top_k, settings.temperature)
        for start in range(0, hidden_AD.shape[0], chunk)
    ]
    ids, logprobs, tail = (torch.cat(part) for part in zip(*parts, strict=True))
    return {"topk_ids": ids, "topk_logprobs": logprobs, "tail_logmass": tail}


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


def collate_targets(rows: Sequence[Mapping[str, np.ndarray]], stored: Sequence[Mapping[str, Stored]], batch: Batch) -> Targets:
    """Pad what the batch's samples have in the cache, in its order, to the batch's shapes. Fields that they lack are None.

    ``rows`` holds decoded fields, ``stored`` those of :data:`QUANTISED`, which stay small integers.
    """
    quantised = {}
    for name, target in QUANTISED.items():
        if name in stored[0]:
            quantised[target] = _pad([row[name] for row in stored], _padded_shape(name, stored, batch))
    ids = logprobs = tail = None
    if "topk_ids" in rows[0]:
        ids = torch.from_numpy(np.concatenate([row["topk_ids"] for row in rows]).astype(np.int64))
        logprobs_AK = torch.from_numpy(np.concatenate([row["topk_logprobs"] for row in rows]))
        logprobs, tail = renormalise(logprobs_AK, torch.from_numpy(np.concatenate([row["tail_logmass"] for row in rows])))
    return Targets(None, None, ids, logprobs, tail, quantised=quantised)


def _padded_shape(name: str, stored: Sequence[Mapping[str, Stored]], batch: Batch) -> tuple[int, ...]:
    """``[H, T, V]`` or ``[V, D]`` of the batch."""
    text, vision = batch.text_rows_BT.shape[1], batch.vision_columns_BV.shape[1]
    if name == "attention":
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
