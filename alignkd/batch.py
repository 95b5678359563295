"""Samples to one batch: placeholders expanded to V positions each, and where text, vision and answers are.

Every position is found from the token ids, so any template, length, number of images and order of text works.

Shapes: B samples, S positions, T text rows (text positions after the sample's first image), V vision columns (all its
images), N images in the batch, A answer tokens in the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from alignkd.models.mobilevlm import IMAGE_TOKEN_ID
from alignkd.prompts import IGNORE


@dataclass(frozen=True)
class ModelInput:
    """One prepared sample: compact ids and labels ``[length]``, and its images.

    ``images`` is ``[n, 3, h, w]`` pixel values or ``[n, P, C]`` tower features; n may be 0.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    images: torch.Tensor


@dataclass(frozen=True)
class Layout:
    """Positions of one sample after expansion: its length, text rows ``[T]``, vision columns ``[V]``, answers ``[A]``.

    ``answers`` are the positions whose logits predict a supervised token: one before the token itself.
    """

    input_ids: np.ndarray
    text_rows: np.ndarray
    vision_columns: np.ndarray
    answers: np.ndarray
    answer_ids: np.ndarray


def expand(input_ids: np.ndarray, labels: np.ndarray, vision_tokens_per_image: int) -> Layout:
    """Expand each image placeholder to its vision tokens and find every position the method needs."""
    is_image = input_ids == IMAGE_TOKEN_ID
    repeats = np.where(is_image, vision_tokens_per_image, 1)
    ids = np.repeat(input_ids, repeats)
    labels = np.repeat(np.where(is_image, IGNORE, labels), repeats)
    vision = np.flatnonzero(ids == IMAGE_TOKEN_ID)
    positions = np.arange(len(ids))
    after = positions > vision[0] if len(vision) else np.zeros(len(ids), dtype=bool)
    supervised = np.flatnonzero(labels[1:] != IGNORE)
    return Layout(ids, positions[after & (ids != IMAGE_TOKEN_ID)], vision, supervised, labels[supervised + 1])


@dataclass(frozen=True)
class Counts:
    """What terms are averaged over: answers, samples with text after an image, samples with an image.

    Where a step has several batches, on one process or many, these are counts of the whole step: the terms and the gradients
    of its batches then add up to those of one large batch. ``processes`` whose gradients are averaged afterwards.
    """

    answers: float
    attended: float
    seen: float
    processes: int = 1


@dataclass(frozen=True)
class Batch:
    """A padded batch. Masks are True where a value is real."""

    input_ids_BS: torch.Tensor
    attention_mask_BS: torch.Tensor
    images: torch.Tensor
    text_rows_BT: torch.Tensor
    text_mask_BT: torch.Tensor
    vision_columns_BV: torch.Tensor
    vision_mask_BV: torch.Tensor
    vision_slots: torch.Tensor
    """Where each vision token of the N images lies in a flattened ``[B * V]``."""
    vision_positions: torch.Tensor
    """Where each vision token of the N images lies in a flattened ``[B * S]``."""
    answer_positions_A: torch.Tensor
    """Where each answer's logits lie in a flattened ``[B * S]``."""
    answer_ids_A: torch.Tensor
    answer_samples_A: torch.Tensor
    """Which sample of the batch each answer token belongs to."""

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on another device (asynchronously from pinned memory)."""
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)}
        return replace(self, **moved)

    def pin_memory(self) -> "Batch":
        """Page-locked copies, so that :meth:`to` need not wait."""
        return replace(self, **{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})

    @property
    def samples(self) -> int:
        """B."""
        return self.input_ids_BS.shape[0]

    def counts(self) -> Counts:
        """Those of this batch; it should lie on the host, or this waits for the device."""
        seen_B = self.vision_mask_BV.any(dim=1)
        attended_B = seen_B & self.text_mask_BT.any(dim=1)
        return Counts(len(self.answer_ids_A), float(attended_B.sum()), float(seen_B.sum()))


def collate(samples: Sequence[ModelInput], *, vision_tokens_per_image: int, pad_token_id: int) -> Batch:
    """Pad samples on the right into one batch."""
    layouts = [expand(s.input_ids, s.labels, vision_tokens_per_image) for s in samples]
    ids, mask = _pad([x.input_ids for x in layouts], pad_token_id)
    rows, row_mask = _pad([x.text_rows for x in layouts], 0)
    columns, column_mask = _pad([x.vision_columns for x in layouts], 0)
    length = ids.shape[1]
    with_images = [s.images for s in samples if len(s.images)]
    return Batch(
        input_ids_BS=ids,
        attention_mask_BS=mask,
        images=torch.cat(with_images) if with_images else torch.zeros(0),
        text_rows_BT=rows,
        text_mask_BT=row_mask,
        vision_columns_BV=columns,
        vision_mask_BV=column_mask,
        vision_slots=column_mask.flatten().nonzero().squeeze(1),
        vision_positions=torch.from_numpy(np.concatenate([i * length + x.vision_columns for i, x in enumerate(layouts)])),
        answer_positions_A=torch.from_numpy(np.concatenate([i * length + x.answers for i, x in enumerate(layouts)])),
        answer_ids_A=torch.from_numpy(np.concatenate([x.answer_ids for x in layouts])),
        answer_samples_A=torch.from_numpy(np.repeat(np.arange(len(layouts)), [len(x.answers) for x in layouts])),
    )


def _pad(arrays: Sequence[np.ndarray], value: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(a) for a in arrays)
    padded = np.full((len(arrays), longest), value, dtype=np.int64)
    mask = np.zeros((len(arrays), longest), dtype=bool)
    for i, array in enumerate(arrays):
        padded[i, : len(array)] = array
        mask[i, : len(array)] = True
    return torch.from_numpy(padded), torch.from_numpy(mask)
