"""Samples to one batch: placeholders are expanded to V positions each; positions of text, vision and answers are found.

Every position is found from the token ids, so any template, length, number of images and order of text works.

Shapes: B samples, S positions, T text rows (text positions after the sample's first image), V vision columns (all its
images), N images in the batch, A answer tokens in the batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch

from alignkd.inputs.prompts import IGNORE, IMAGE_TOKEN_ID
from alignkd.inputs.regions import NO_REGIONS
from alignkd.inputs.spans import NO_SPANS


@dataclass(frozen=True)
class ModelInput:
    """One prepared sample: ids and labels ``[length]``, and its images.

    ``images`` has the form that its family takes: ``[n, 3, h, w]`` pixel values or ``[n, P, C]`` tower features; n may be 0.
    ``token_inputs``: other inputs that its model needs for each token, ``[length]``; ``image_inputs``: for its images.
    ``regions_R8``: coordinates of its vision tokens (:mod:`alignkd.inputs.regions`). ``spans``: the characters of the
    conversation that each id stands for (:mod:`alignkd.inputs.spans`), ``[length, 2]``. ``destroyed``: the same sample with
    its images destroyed (:mod:`alignkd.inputs.destroyed`); None where it has none, or nothing asked for it.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    images: torch.Tensor
    token_inputs: Mapping[str, np.ndarray] = field(default_factory=dict)
    image_inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    regions_R8: np.ndarray = field(default_factory=lambda: NO_REGIONS)
    spans: np.ndarray = field(default_factory=lambda: NO_SPANS)
    destroyed: "ModelInput | None" = None


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


def expand(
    input_ids: np.ndarray, labels: np.ndarray, tokens_per_placeholder: int, image_token_id: int = IMAGE_TOKEN_ID
) -> Layout:
    """Expand each image placeholder to its vision tokens and find every position that the method needs."""
    is_image = input_ids == image_token_id
    repeats = np.where(is_image, tokens_per_placeholder, 1)
    ids = np.repeat(input_ids, repeats)
    labels = np.repeat(np.where(is_image, IGNORE, labels), repeats)
    vision = np.flatnonzero(ids == image_token_id)
    positions = np.arange(len(ids))
    after = positions > vision[0] if len(vision) else np.zeros(len(ids), dtype=bool)
    supervised = np.flatnonzero(labels[1:] != IGNORE)
    return Layout(ids, positions[after & (ids != image_token_id)], vision, supervised, labels[supervised + 1])


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What terms are averaged over: answer tokens, samples with text after an image, samples with an image, all samples.

    Where a step has several batches, on one process or many, these are counts of the whole step: the terms and the gradients
    of its batches then add up to those of one large batch. ``processes`` whose gradients are averaged afterwards.
    """

    answers: float
    with_text_after_image: float
    with_image: float
    samples: float
    processes: int = 1


@dataclass(frozen=True)
class Batch:
    """A padded batch. Masks are False at padding."""

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
    token_inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Other inputs of the model for each token, ``[B, S]``, by their names there."""
    image_inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Other inputs of the model for its images, by their names there."""
    destroyed: "Batch | None" = None
    """The samples with an image again, in their order, with their images destroyed; None where nothing asked for it."""

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on another device (asynchronously from pinned memory)."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Page-locked copies, so that :meth:`to` need not wait."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        def mapped(value: Any) -> Any:
            if isinstance(value, Batch):
                return value._map(function)
            if value is None or isinstance(value, torch.Tensor):
                return None if value is None else function(value)
            return {k: function(v) for k, v in value.items()}

        return replace(self, **{f.name: mapped(getattr(self, f.name)) for f in fields(self)})

    @property
    def samples(self) -> int:
        """B."""
        return self.input_ids_BS.shape[0]

    def counts(self) -> Counts:
        """The counts of this batch. It should be on the host: otherwise this waits for the device."""
        return Counts(
            answers=len(self.answer_ids_A),
            with_text_after_image=float(self.samples_with_text_after_image().sum()),
            with_image=float(self.samples_with_image().sum()),
            samples=self.samples,
        )

    def samples_with_image(self) -> torch.Tensor:
        """Samples with an image, ``[B]`` of bool."""
        return self.vision_mask_BV.any(dim=1)

    def samples_with_text_after_image(self) -> torch.Tensor:
        """Samples with text after an image, ``[B]`` of bool."""
        return self.samples_with_image() & self.text_mask_BT.any(dim=1)

    def samples_of_answers(self, chosen_A: torch.Tensor) -> torch.Tensor:
        """Samples that a chosen answer token belongs to, ``[B]`` of bool."""
        found_B = torch.zeros(self.samples, dtype=torch.int32, device=chosen_A.device)
        return found_B.index_add_(0, self.answer_samples_A, chosen_A.to(torch.int32)) > 0


def collate(
    samples: Sequence[ModelInput],
    *,
    tokens_per_placeholder: int,
    pad_token_id: int,
    image_token_id: int = IMAGE_TOKEN_ID,
    pad_left: bool = False,
) -> Batch:
    """Pad samples into one batch: on the right or, for generation, on the left; positions are then not usable."""
    layouts = [expand(s.input_ids, s.labels, tokens_per_placeholder, image_token_id) for s in samples]
    ids, mask = _pad([x.input_ids for x in layouts], pad_token_id, left=pad_left)
    rows, row_mask = _pad([x.text_rows for x in layouts], 0)
    columns, column_mask = _pad([x.vision_columns for x in layouts], 0)
    length = ids.shape[1]
    with_images = [s for s in samples if len(s.images)]
    destroyed = [s.destroyed for s in samples if s.destroyed is not None]
    return Batch(
        input_ids_BS=ids,
        attention_mask_BS=mask,
        images=_join([s.images for s in with_images]) if with_images else torch.zeros(0),
        text_rows_BT=rows,
        text_mask_BT=row_mask,
        vision_columns_BV=columns,
        vision_mask_BV=column_mask,
        vision_slots=column_mask.flatten().nonzero().squeeze(1),
        vision_positions=torch.from_numpy(np.concatenate([i * length + x.vision_columns for i, x in enumerate(layouts)])),
        answer_positions_A=torch.from_numpy(np.concatenate([i * length + x.answers for i, x in enumerate(layouts)])),
        answer_ids_A=torch.from_numpy(np.concatenate([x.answer_ids for x in layouts])),
        answer_samples_A=torch.from_numpy(np.repeat(np.arange(len(layouts)), [len(x.answers) for x in layouts])),
        token_inputs={
            name: _pad([s.token_inputs[name] for s in samples], 0, left=pad_left)[0] for name in samples[0].token_inputs
        },
        image_inputs={
            name: _join([s.image_inputs[name] for s in with_images])
            for name in (with_images[0].image_inputs if with_images else ())
        },
        destroyed=collate(
            destroyed,
            tokens_per_placeholder=tokens_per_placeholder,
            pad_token_id=pad_token_id,
            image_token_id=image_token_id,
            pad_left=pad_left,
        )
        if destroyed
        else None,
    )


def _join(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """One after the other along the first axis; the other axes padded with zeros to the largest, as tiles of an image are."""
    largest = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors), strict=True)]
    joined = tensors[0].new_zeros(sum(len(t) for t in tensors), *largest)
    start = 0
    for t in tensors:
        joined[(slice(start, start + len(t)), *map(slice, t.shape[1:]))] = t
        start += len(t)
    return joined


def _pad(arrays: Sequence[np.ndarray], value: int, *, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(a) for a in arrays)
    padded = np.full((len(arrays), longest), value, dtype=np.int64)
    mask = np.zeros((len(arrays), longest), dtype=bool)
    for i, array in enumerate(arrays):
        part = slice(longest - len(array), longest) if left else slice(0, len(array))
        padded[i, part] = array
        mask[i, part] = True
    return torch.from_numpy(padded), torch.from_numpy(mask)


@dataclass(frozen=True)
class Collator:
    """Makes batches of one model's inputs (:attr:`alignkd.models.vlm.Vlm.collator`); can be sent to worker processes."""

    tokens_per_placeholder: int
    pad_token_id: int
    image_token_id: int = IMAGE_TOKEN_ID

    def __call__(self, inputs: Sequence[ModelInput], *, pad_left: bool = False) -> Batch:
        """See :func:`collate`."""
        return collate(
            inputs,
            tokens_per_placeholder=self.tokens_per_placeholder,
            pad_token_id=self.pad_token_id,
            image_token_id=self.image_token_id,
            pad_left=pad_left,
        )

    def expand(self, given: ModelInput) -> Layout:
        """See :func:`expand`."""
        return expand(given.input_ids, given.labels, self.tokens_per_placeholder, self.image_token_id)
