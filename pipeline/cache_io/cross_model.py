"""A row that a teacher of another make left, in the student's layout; and what of a batch then has a target.

The row is decoded on the host, mapped by :mod:`alignkd.targets.cross_model`, and handed on as exact float32 in place of what
was stored.

Shapes: H teacher heads, T text rows, V vision tokens, D teacher width, A answers; a trailing s: of the student.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from alignkd.cache_store.rows.row import EncodedField, Row
from alignkd.cache_store.rows.spec import FieldSpec
from alignkd.inputs.batch import Batch, ModelInput
from alignkd.models.vlm import Vlm
from alignkd.pipeline.config.cache_layout import attention_layer
from alignkd.targets.batch_targets import Targets
from alignkd.targets.cross_model import CrossModelError, Text, map_rows, map_vision, pair_answers

LAYOUT = frozenset({"input_ids", "labels", "spans", "regions"})
"""Fields of a row that say what its targets are about."""


@dataclass(frozen=True)
class TargetMask:
    """What of a sample has a target, of bool: text rows ``[Ts]``, vision tokens ``[Vs]``, answers ``[As]``; None for all."""

    rows: np.ndarray | None = None
    columns: np.ndarray | None = None
    answers: np.ndarray | None = None


@dataclass(frozen=True)
class CrossModelMap:
    """How rows of one teacher become targets of a student of another make.

    Of each side the id that stands for vision tokens, and how many of them one such id becomes.
    """

    teacher_image: tuple[int, int]
    student_image: tuple[int, int]

    @classmethod
    def of(cls, student: Vlm, fingerprint: Mapping[str, Any]) -> "CrossModelMap":
        """Between the teacher that a cache's fingerprint describes and a student."""
        teacher = fingerprint["teacher"]
        theirs = int(teacher["image_token_id"]), int(teacher["tokens_per_placeholder"])
        return cls(theirs, (student.image_token_id, student.tokens_per_placeholder))

    def __call__(
        self, row: Row, given: ModelInput, stored: Mapping[str, EncodedField]
    ) -> tuple[dict[str, EncodedField], TargetMask]:
        """Targets in the student's layout: ``row`` holds all fields decoded that are no answers', ``stored`` those of answers.

        Raises:
            CrossModelError: the two cannot be aligned, and why.
        """
        values = row.values
        teacher = _text(values["input_ids"], values["labels"], values["spans"], self.teacher_image)
        student = _text(given.input_ids, given.labels, given.spans, self.student_image)
        found, compared = dict(stored), TargetMask()
        if "regions" in values:
            mapped, rows, columns = _vision(values, teacher, student, given.regions_R8)
            found, compared = found | mapped, TargetMask(rows, columns)
        if stored:
            pairs = pair_answers(teacher, student)
            found |= {name: _chosen(target, pairs[pairs >= 0]) for name, target in stored.items()}
            compared = replace(compared, answers=pairs >= 0)
        return found, compared


def _text(input_ids: np.ndarray, labels: np.ndarray, spans: np.ndarray, image: tuple[int, int]) -> Text:
    if len(spans) != len(input_ids):
        raise CrossModelError("of one of the two, the tokenizer does not tell which characters an id covers")
    return Text(input_ids, labels, spans, *image)


def _vision(
    values: Mapping[str, np.ndarray], teacher: Text, student: Text, student_R8: np.ndarray
) -> tuple[dict[str, EncodedField], np.ndarray, np.ndarray]:
    """Attention and vision tokens of a row in the student's layout, and which text rows and vision tokens have a target."""
    vision = map_vision(values["regions"], student_R8)
    rows = map_rows(teacher, student, values["regions"], student_R8)
    found = {}
    for name, target in values.items():
        if attention_layer(name) is not None:
            _check(name, target.shape[1:], (rows.mean.shape[1], vision.share.shape[0]))
            found[name] = _exact(name, rows.mean @ (target @ vision.share))
        elif name == "vision_tokens":
            _check(name, target.shape[:1], vision.share.shape[:1])
            found[name] = _exact(name, vision.mean @ target)
    return found, rows.known, vision.known


def _check(name: str, held: tuple[int, ...], described: tuple[int, ...]) -> None:
    if held != described:
        raise CrossModelError(f"the row's {name} is for {held} rows and columns, its ids and regions say {described}")


def _exact(name: str, values: np.ndarray) -> EncodedField:
    values = np.ascontiguousarray(values, dtype=np.float32)
    dims = tuple("HTVD"[-values.ndim :])
    return EncodedField(FieldSpec(name, dims, "float32", "exact"), values.shape, {"values": values})


def _chosen(target: EncodedField, answers: np.ndarray) -> EncodedField:
    """Some of the answers."""
    parts = {name: values[answers] for name, values in target.parts.items()}
    return EncodedField(target.field, (len(answers), *target.shape[1:]), parts)


def with_masks(targets: Targets, compared: Sequence[TargetMask], batch: Batch) -> Targets:
    """Targets with what of the batch they are about."""
    rows, columns = [x.rows for x in compared if x.rows is not None], [x.columns for x in compared if x.columns is not None]
    if rows:
        targets = replace(
            targets,
            row_mask_BT=_padded(rows, batch.text_rows_BT.shape[1]),
            column_mask_BV=_padded(columns, batch.vision_columns_BV.shape[1]),
        )
    answers = [x.answers for x in compared if x.answers is not None]
    if answers and not (paired_A := np.concatenate(answers)).all():
        paired_P, unpaired_U = (torch.from_numpy(np.flatnonzero(chosen)) for chosen in (paired_A, ~paired_A))
        targets = replace(targets, paired_P=paired_P, unpaired_U=unpaired_U)
    return targets


def _padded(masks: Iterable[np.ndarray], width: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.pad(mask, (0, width - len(mask))) for mask in masks]))
