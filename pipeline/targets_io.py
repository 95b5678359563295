"""Where the method meets the disk: captured targets to cache rows, and cache rows to a batch's targets.

Shapes: H teacher heads, T text rows, V vision columns, D teacher width, A answers, K kept logits, L ids.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from alignkd.batch import Batch, ModelInput
from alignkd.cache_store.spec import FieldSpec
from alignkd.capture import capture
from alignkd.models.vlm import Vlm
from alignkd.targets import Targets, renormalise, topk_targets

TARGETS = ("attention", "vision", "logits")


@dataclass(frozen=True)
class TargetSettings:
    """Which targets a cache holds, and how."""

    targets: tuple[str, ...] = TARGETS
    attention: str = "per-head"
    top_k: int = 64
    temperature: float = 1.0
    attention_codec: str = "float16"
    vision_codec: str = "float16"

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
            fields.append(FieldSpec("vision_tokens", ("V", "D"), "float32", self.vision_codec))
        if "logits" in self.targets:
            fields.append(FieldSpec("topk_ids", ("A", "K"), ids_dtype, "exact"))
            fields.append(FieldSpec("topk_logprobs", ("A", "K"), "float32", "float16"))
            fields.append(FieldSpec("tail_logmass", ("A",), "float32", "exact"))
        return tuple(fields)


@torch.inference_mode()
def teacher_values(
    teacher: Vlm, batch: Batch, inputs: Sequence[ModelInput], settings: TargetSettings
) -> list[dict[str, np.ndarray]]:
    """Run the teacher over a batch; the values of each sample's row, unpadded."""
    captured = capture(teacher.model, batch, attention="attention" in settings.targets)
    values: list[dict[str, np.ndarray]] = [
        {"input_ids": x.input_ids.astype(np.int32), "labels": x.labels.astype(np.int32)} for x in inputs
    ]
    rows, columns = batch.text_mask_BT.sum(1).tolist(), batch.vision_mask_BV.sum(1).tolist()
    if captured.attention_BHTV is not None:
        attention = captured.attention_BHTV
        if settings.attention == "mean":
            attention = attention.mean(dim=1, keepdim=True)
        on_host = attention.cpu().numpy()
        for i, value in enumerate(values):
            value["attention"] = on_host[i, :, : rows[i], : columns[i]]
    if "vision" in settings.targets:
        tokens = captured.vision_BVD.float().cpu().numpy()
        for i, value in enumerate(values):
            value["vision_tokens"] = tokens[i, : columns[i]]
    if "logits" in settings.targets:
        _add_logits(teacher, captured.hidden_AD, batch, settings, values)
    return values


def _add_logits(
    teacher: Vlm, hidden_AD: torch.Tensor, batch: Batch, settings: TargetSettings, values: list[dict[str, np.ndarray]]
) -> None:
    chunk = max(1, 2**25 // teacher.vocabulary)
    parts = [
        topk_targets(teacher.model.lm_head(hidden_AD[start : start + chunk]), settings.top_k, settings.temperature)
        for start in range(0, hidden_AD.shape[0], chunk)
    ]
    ids, logprobs, tail = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
    dtype = np.uint16 if teacher.vocabulary <= 2**16 else np.uint32
    owners = batch.answer_samples_A.cpu().numpy()
    for i, value in enumerate(values):
        mine = owners == i
        value["topk_ids"] = ids[mine].astype(dtype)
        value["topk_logprobs"] = logprobs[mine]
        value["tail_logmass"] = tail[mine]


def collate_targets(rows: Sequence[Mapping[str, np.ndarray]], batch: Batch) -> Targets:
    """Pad the rows of a batch's samples, in its order, to the batch's shapes. Fields that the rows lack are None."""
    text, vision = batch.text_rows_BT.shape[1], batch.vision_columns_BV.shape[1]
    first = rows[0]
    attention = tokens = ids = logprobs = tail = None
    if "attention" in first:
        heads = max(row["attention"].shape[0] for row in rows)
        attention = torch.zeros(len(rows), heads, text, vision)
        for i, row in enumerate(rows):
            _, t, v = row["attention"].shape
            attention[i, :, :t, :v] = torch.from_numpy(np.ascontiguousarray(row["attention"]))
    if "vision_tokens" in first:
        width = max(row["vision_tokens"].shape[1] for row in rows)
        tokens = torch.zeros(len(rows), vision, width)
        for i, row in enumerate(rows):
            tokens[i, : row["vision_tokens"].shape[0]] = torch.from_numpy(np.ascontiguousarray(row["vision_tokens"]))
    if "topk_ids" in first:
        ids = torch.from_numpy(np.concatenate([row["topk_ids"] for row in rows]).astype(np.int64))
        stored = torch.from_numpy(np.concatenate([row["topk_logprobs"] for row in rows]))
        logprobs, tail = renormalise(stored, torch.from_numpy(np.concatenate([row["tail_logmass"] for row in rows])))
    return Targets(attention, tokens, ids, logprobs, tail)
