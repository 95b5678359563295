"""Which samples' numbers are finite. NaN and infinity of one sample do not touch the others: attention stays within a sample.

Everything here is computed on the device, and read when the targets of the batch are on the host.

Shapes: B samples, H heads, T text rows, V vision columns, D width, A answers, N vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from alignkd.cache_store.rows.reasons import NOT_FINITE
from alignkd.inputs.batch import Batch
from alignkd.pipeline.config.cache_layout import attention_layer

REASON = f"{NOT_FINITE}: the teacher's pass over it gives NaN or infinity"


@dataclass(frozen=True)
class FiniteMarks:
    """True where the targets of a sample, and the hidden state and logits of an answer, are finite, on the host."""

    samples_B: torch.Tensor
    answers_A: torch.Tensor

    def of_samples(self, batch: Batch) -> list[bool]:
        """Of each sample, its targets and all its answers. ``batch`` is on the host."""
        broken = {*batch.answer_samples_A[~self.answers_A].tolist()}
        return [found and sample not in broken for sample, found in enumerate(self.samples_B.tolist())]


def finite_targets(tensors: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor:
    """Whether a sample's attention ``[B, H, T, V]`` and vision tokens ``[B, V, D]`` are finite, ``[B]``."""
    finite_B = torch.ones(batch.samples, dtype=torch.bool, device=batch.input_ids_BS.device)
    for name, values in tensors.items():
        if not values.numel():
            continue
        if attention_layer(name) is not None:
            # Probabilities are at most 1, so their sum over a row is finite where they are.
            finite_BT = values.sum(dim=(1, 3)).isfinite()
            finite_B &= (finite_BT | ~batch.text_mask_BT).all(dim=1)
        else:
            finite_B &= (finite_rows(values) | ~batch.vision_mask_BV).all(dim=1)
    return finite_B


def finite_rows(values: torch.Tensor) -> torch.Tensor:
    """Whether the values along the last axis are all finite; that axis is gone."""
    if not values.numel():
        return torch.ones(values.shape[:-1], dtype=torch.bool, device=values.device)
    least, most = values.aminmax(dim=-1)
    return least.isfinite() & most.isfinite()


def finite_logits(logits_AN: torch.Tensor) -> torch.Tensor:
    """Whether an answer's logits give a distribution, ``[A]``: no NaN, no positive infinity, and not all negative infinity."""
    return logits_AN.amax(dim=-1).isfinite() if len(logits_AN) else torch.ones(0, dtype=torch.bool, device=logits_AN.device)


def advice(dtype: str) -> str:
    """What a user can do about numbers that are not finite."""
    if dtype == "float16":
        return "Numbers of --dtype float16 end at 65,504: use --dtype bfloat16, or float32, and another --cache"
    return "Look for damaged weights: load the teacher elsewhere, or download it again"
