"""Targets in a cache: the fields of a row, and the rows of a batch's samples as its targets.

Shapes: H teacher heads, T text rows, V vision columns, D teacher width, A answers, J draws, L ids.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from alignkd.cache_store.codecs import get_codec
from alignkd.cache_store.rows.row import EncodedField
from alignkd.cache_store.rows.spec import FieldSpec
from alignkd.inputs.batch import Batch
from alignkd.pipeline.cache_io.logits import logit_fields
from alignkd.pipeline.config.cache_layout import ADVANTAGE, attention_field, attention_layer
from alignkd.pipeline.config.targets import TargetSettings
from alignkd.targets.batch_targets import Targets
from alignkd.targets.dequantise import Quantised

ADVANTAGE_FIELD = FieldSpec(ADVANTAGE, ("A",), "float32", "nats8")
"""One byte an answer token."""


def row_fields(settings: TargetSettings, vocabulary: int) -> tuple[FieldSpec, ...]:
    """The fields of a cache's rows: token ids and labels, what maps them to students of other architectures, then the targets.

    ``vocabulary``: columns of the teacher's output head.
    """
    fields = [FieldSpec("input_ids", ("L",), "int32", "exact"), FieldSpec("labels", ("L",), "int32", "exact")]
    if settings.cross_model:
        fields.append(FieldSpec("spans", ("L", "E"), "int32", "exact"))
    if settings.cross_model and {"attention", "vision"} & set(settings.targets):
        fields.append(FieldSpec("regions", ("R", "C"), "float32", "exact", per_image=True))
    if "attention" in settings.targets:
        names = [attention_field(layer) for layer in settings.attention_layers]
        fields += [FieldSpec(name, ("H", "T", "V"), "float32", settings.attention_codec) for name in names]
    if "vision" in settings.targets:
        fields.append(FieldSpec("vision_tokens", ("V", "D"), "float32", settings.vision_codec, per_image=True))
    if "logits" in settings.targets:
        fields += logit_fields(settings.logits, vocabulary)
    if ADVANTAGE in settings.targets:
        fields.append(ADVANTAGE_FIELD)
    return tuple(fields)


def collate_targets(stored: Sequence[Mapping[str, EncodedField]], batch: Batch, places: Sequence[int] | None = None) -> Targets:
    """The encoded fields of a batch's samples, padded to the batch's shapes and still encoded.

    ``places``: which of its samples these are; None: all, in its order. The others are zero, and have no answers. A target
    whose fields the samples lack stays None.
    """
    attention, vision, answers, advantage = {}, None, {}, None
    places = range(len(stored)) if places is None else places
    for name in stored[0]:
        of_samples = dict(zip(places, (row[name] for row in stored), strict=True))
        if (layer := attention_layer(name)) is not None:
            attention[layer] = _pad(of_samples, (batch.samples, *_attention_shape(of_samples.values(), batch)))
        elif name == "vision_tokens":
            width = max(row.shape[1] for row in of_samples.values())
            vision = _pad(of_samples, (batch.samples, batch.vision_columns_BV.shape[1], width))
        elif name == ADVANTAGE:
            advantage = _concatenate(list(of_samples.values()))
        else:
            answers[name] = _concatenate(list(of_samples.values()))
    return Targets(attention, vision, answers, advantage)


def _concatenate(stored: Sequence[EncodedField]) -> Quantised:
    """The answers of all samples, one after the other."""
    parts = {part: torch.from_numpy(np.concatenate([row.parts[part] for row in stored])) for part in stored[0].parts}
    return Quantised(stored[0].field.codec, (sum(row.shape[0] for row in stored), *stored[0].shape[1:]), parts)


def _attention_shape(stored: Iterable[EncodedField], batch: Batch) -> tuple[int, int, int]:
    """``[H, T, V]`` of the batch."""
    return max(row.shape[0] for row in stored), batch.text_rows_BT.shape[1], batch.vision_columns_BV.shape[1]


def _pad(stored: Mapping[int, EncodedField], shape: tuple[int, ...]) -> Quantised:
    """Pad the parts of each sample, by its place, with zeros, which every codec decodes to zeros."""
    field, parts = next(iter(stored.values())).field, {}
    for part, (part_shape, dtype) in get_codec(field.codec).layout(shape[1:], field.numpy_dtype).items():
        padded = np.zeros((shape[0], *part_shape), dtype.newbyteorder("="))
        for i, row in stored.items():
            values = row.parts[part]
            padded[i][tuple(slice(size) for size in values.shape)] = values
        parts[part] = torch.from_numpy(padded)
    return Quantised(field.codec, shape, parts)
