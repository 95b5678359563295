"""Cached rows of one teacher as targets of a student of another architecture, and which parts of a batch have a target.

A row is decoded on the host, mapped by :mod:`alignkd.targets.cross_model`, and passed on as exact float32.

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
from alignkd.pipeline.config.fingerprint_keys import check_fingerprint_keys
from alignkd.targets.batch_targets import Targets
from alignkd.targets.cross_model import CrossModelError, Text, map_rows, map_vision, pair_answers

LAYOUT = frozenset({"input_ids", "labels", "spans", "regions"})
"""Fields of a row that say which tokens its targets are about."""


@dataclass(frozen=True)
class TargetMask:
    """Which parts of a sample have a target, as booleans: text rows ``[Ts]``, vision tokens ``[Vs]``, answers ``[As]``.

    None: all of them.
    """

    rows: np.ndarray | None = None
    columns: np.ndarray | None = None
    answers: np.ndarray | None = None


@dataclass(frozen=True)
class CrossModelMap:
    """Maps rows of one teacher to targets of a student of another architecture.

    ``teacher_image`` and ``student_image``: the placeholder of each, and the number of vision tokens that replace one.
    """

    teacher_image: tuple[int, int]
    student_image: tuple[int, int]

    @classmethod
    def of(cls, student: Vlm, fingerprint: Mapping[str, Any]) -> "CrossModelMap":
        """The map from the teacher that a cache's fingerprint describes to a student.

        Raises:
            CacheError: the fingerprint does not describe the teacher's placeholder.
        """
        check_fingerprint_keys(fingerprint, "teacher.image_token_id", "teacher.tokens_per_placeholder")
        teacher = fingerprint["teacher"]
        teacher_image = teacher["image_token_id"], teacher["tokens_per_placeholder"]
        return cls(teacher_image, (student.image_token_id, student.tokens_per_placeholder))

    def __call__(
        self, row: Row, model_input: ModelInput, answer_fields: Mapping[str, EncodedField]
    ) -> tuple[dict[str, EncodedField], TargetMask]:
        """Targets in the student's layout.

        ``row`` holds all fields decoded but those of answers, ``answer_fields`` those of answers still encoded.

        Raises:
            CrossModelError: the two cannot be matched, and why.
        """
        values = row.values
        if lacking := sorted({"input_ids", "labels", "spans"} - values.keys()):
            raise CrossModelError(f"the row lacks {', '.join(lacking)}: write another cache with alignkd cache-teacher")
        teacher = _text(values["input_ids"], values["labels"], values["spans"], self.teacher_image)
        student = _text(model_input.input_ids, model_input.labels, model_input.spans, self.student_image)
        targets, mask = dict(answer_fields), TargetMask()
        if "regions" in values:
            mapped, rows, columns = _map_visual(values, teacher, student, model_input.regions_R8)
            targets, mask = targets | mapped, TargetMask(rows, columns)
        if answer_fields:
            pairs = pair_answers(teacher, student)
            targets |= {name: _select(field, pairs[pairs >= 0]) for name, field in answer_fields.items()}
            mask = replace(mask, answers=pairs >= 0)
        return targets, mask


def _text(input_ids: np.ndarray, labels: np.ndarray, spans: np.ndarray, image: tuple[int, int]) -> Text:
    if len(spans) != len(input_ids):
        raise CrossModelError(
            f"one tokenizer of the two says for {len(spans)} of {len(input_ids)} token ids which characters they cover;"
            " it must say so for all"
        )
    return Text(input_ids, labels, spans, *image)


def _map_visual(
    values: Mapping[str, np.ndarray], teacher: Text, student: Text, student_R8: np.ndarray
) -> tuple[dict[str, EncodedField], np.ndarray, np.ndarray]:
    """Attention and vision tokens of a row in the student's layout, and which text rows and vision tokens have a target."""
    vision = map_vision(values["regions"], student_R8)
    rows = map_rows(teacher, student, values["regions"], student_R8)
    mapped = {}
    for name, target in values.items():
        if attention_layer(name) is not None:
            _check_shape(name, target.shape[1:], (rows.mean.shape[1], vision.share.shape[0]))
            mapped[name] = _exact(name, rows.mean @ (target @ vision.share))
        elif name == "vision_tokens":
            _check_shape(name, target.shape[:1], vision.share.shape[:1])
            mapped[name] = _exact(name, vision.mean @ target)
    return mapped, rows.known, vision.known


def _check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise CrossModelError(f"the row's {name} has {found} rows and columns, but its ids and regions give {expected}")


def _exact(name: str, values: np.ndarray) -> EncodedField:
    values = np.ascontiguousarray(values, dtype=np.float32)
    dims = tuple("HTVD"[-values.ndim :])
    return EncodedField(FieldSpec(name, dims, "float32", "exact"), values.shape, {"values": values})


def _select(field: EncodedField, answers: np.ndarray) -> EncodedField:
    """Some of the answers, by their indices."""
    parts = {name: values[answers] for name, values in field.parts.items()}
    return EncodedField(field.field, (len(answers), *field.shape[1:]), parts)


def with_masks(targets: Targets, masks: Sequence[TargetMask], batch: Batch) -> Targets:
    """A batch's targets with the padded masks of its samples; answers have none where each of them has a target."""
    rows, columns = [m.rows for m in masks if m.rows is not None], [m.columns for m in masks if m.columns is not None]
    if rows:
        targets = replace(
            targets,
            row_mask_BT=_padded(rows, batch.text_rows_BT.shape[1]),
            column_mask_BV=_padded(columns, batch.vision_columns_BV.shape[1]),
        )
    answers = [m.answers for m in masks if m.answers is not None]
    if answers and not (paired_A := np.concatenate(answers)).all():
        paired_P, unpaired_U = (torch.from_numpy(np.flatnonzero(chosen)) for chosen in (paired_A, ~paired_A))
        targets = replace(targets, paired_P=paired_P, unpaired_U=unpaired_U)
    return targets


def _padded(masks: Iterable[np.ndarray], width: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.pad(mask, (0, width - len(mask))) for mask in masks]))
