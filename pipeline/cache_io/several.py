"""Rows of several caches as the targets of one batch.

Shapes: K teachers, B samples, T text rows, V vision columns, A answers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from alignkd.cache_store.rows.row import EncodedField
from alignkd.inputs.batch import Batch
from alignkd.pipeline.cache_io.cross_model import TargetMask
from alignkd.pipeline.cache_io.targets import collate_targets
from alignkd.targets.batch_targets import Targets
from alignkd.targets.several import SeveralTargets, combine


@dataclass(frozen=True)
class TaughtRow:
    """What one teacher, by its number, has stored for a sample, and how much it counts for it.

    ``mask``: which parts of the sample have a target, None where all have one.
    """

    teacher: int
    weight: float
    stored: Mapping[str, EncodedField]
    mask: TargetMask | None = None


def collate_several(samples: Sequence[Sequence[TaughtRow]], teachers: int, batch: Batch) -> SeveralTargets:
    """The rows of each of a batch's samples, in its order, as targets that are still encoded."""
    weights_KB = np.zeros((teachers, batch.samples))
    by_teacher: list[dict[int, TaughtRow]] = [{} for _ in range(teachers)]
    for place, rows in enumerate(samples):
        for row in rows:
            weights_KB[row.teacher, place] = row.weight
            by_teacher[row.teacher][place] = row
    return combine([_of_teacher(rows, batch) if rows else None for rows in by_teacher], weights_KB, batch)


def _of_teacher(rows: Mapping[int, TaughtRow], batch: Batch) -> Targets:
    """The targets of one teacher, with masks that leave out the samples that are not in ``rows``, by their place."""
    targets = collate_targets([row.stored for row in rows.values()], batch, list(rows))
    answers_B = np.bincount(batch.answer_samples_A.numpy(), minlength=batch.samples)
    paired_A = np.concatenate([_answers(rows.get(place), count) for place, count in enumerate(answers_B.tolist())])
    if (targets.answers or targets.advantage_A is not None) and not paired_A.all():
        paired_P, unpaired_U = (torch.from_numpy(np.flatnonzero(chosen)) for chosen in (paired_A, ~paired_A))
        targets = replace(targets, paired_P=paired_P, unpaired_U=unpaired_U)
    return replace(
        targets,
        row_mask_BT=_mask(rows, tuple(batch.text_rows_BT.shape), lambda mask: mask.rows),
        column_mask_BV=_mask(rows, tuple(batch.vision_columns_BV.shape), lambda mask: mask.columns),
    )


def _answers(row: TaughtRow | None, count: int) -> np.ndarray:
    """Which answers of a sample have a target, ``[count]`` of bool."""
    if row is None or row.mask is None or row.mask.answers is None:
        return np.full(count, row is not None)
    return row.mask.answers


def _mask(
    rows: Mapping[int, TaughtRow], shape: tuple[int, ...], part: Callable[[TargetMask], np.ndarray | None]
) -> torch.Tensor | None:
    """Where samples have targets; None where all of them do."""
    parts = {place: None if row.mask is None else part(row.mask) for place, row in rows.items()}
    if len(parts) == shape[0] and all(found is None for found in parts.values()):
        return None
    mask = np.zeros(shape, dtype=bool)
    for place, found in parts.items():
        if found is None:
            mask[place] = True
        else:
            mask[place, : len(found)] = found
    return torch.from_numpy(mask)
