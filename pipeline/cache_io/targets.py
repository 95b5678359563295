"""Where the method meets the disk: captured targets to cache rows, and cache rows to a batch's targets.

Shapes: H teacher heads, T text rows, V vision columns, D teacher width, A answers, J draws, L ids.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from alignkd.cache_store.codecs import get_codec
from alignkd.cache_store.rows.row import EncodedField
from alignkd.cache_store.rows.spec import FieldSpec
from alignkd.inputs.batch import Batch
from alignkd.pipeline.cache_io.logits import logit_fields
from alignkd.pipeline.config.cache_layout import attention_field, attention_layer
from alignkd.pipeline.config.targets import TargetSettings
from alignkd.targets.batch_targets import Targets
from alignkd.targets.dequantise import Quantised


def row_fields(settings: TargetSettings, vocabulary: int) -> tuple[FieldSpec, ...]:
    """The fields of a cache's rows: ids and labels always, what another make of student needs, then the targets."""
    fields = [FieldSpec("input_ids", ("L",), "int32", "exact"), FieldSpec("labels", ("L",), "int32", "exact")]
    if settings.across:
        fields.append(FieldSpec("spans", ("L", "E"), "int32", "exact"))
    if settings.across and {"attention", "vision"} & set(settings.targets):
        fields.append(FieldSpec("regions", ("R", "C"), "float32", "exact", per_image=True))
    if "attention" in settings.targets:
        names = [attention_field(layer) for layer in settings.attention_layers]
        fields += [FieldSpec(name, ("H", "T", "V"), "float32", settings.attention_codec) for name in names]
    if "vision" in settings.targets:
        fields.append(FieldSpec("vision_tokens", ("V", "D"), "float32", settings.vision_codec, per_image=True))
    if "logits" in settings.targets:
        fields += logit_fields(settings.logits, vocabulary)
    return tuple(fields)


def collate_targets(stored: Sequence[Mapping[str, EncodedField]], batch: Batch) -> Targets:
    """Pad what the batch's samples have in the cache, in its order, to the batch's shapes; all of it stays as it is stored.

    Fields that the samples lack are absent.
    """
    attention, vision, answers = {}, None, {}
    for name in stored[0]:
        of_samples = [row[name] for row in stored]
        if (layer := attention_layer(name)) is not None:
            attention[layer] = _pad(of_samples, _attention_shape(of_samples, batch))
        elif name == "vision_tokens":
            vision = _pad(of_samples, (batch.vision_columns_BV.shape[1], max(row.shape[1] for row in of_samples)))
        else:
            answers[name] = _concatenate(of_samples)
    return Targets(attention, vision, answers)


def _concatenate(stored: Sequence[EncodedField]) -> Quantised:
    """Answer after answer."""
    parts = {part: torch.from_numpy(np.concatenate([row.parts[part] for row in stored])) for part in stored[0].parts}
    return Quantised(stored[0].field.codec, (sum(row.shape[0] for row in stored), *stored[0].shape[1:]), parts)


def _attention_shape(stored: Sequence[EncodedField], batch: Batch) -> tuple[int, int, int]:
    """``[H, T, V]`` of the batch."""
    return max(row.shape[0] for row in stored), batch.text_rows_BT.shape[1], batch.vision_columns_BV.shape[1]


def _pad(stored: Sequence[EncodedField], shape: tuple[int, ...]) -> Quantised:
    """The parts of each sample in a corner of zeros: a codec decodes those to zeros."""
    field, parts = stored[0].field, {}
    for part, (part_shape, dtype) in get_codec(field.codec).layout(shape, field.numpy_dtype).items():
        padded = np.zeros((len(stored), *part_shape), dtype.newbyteorder("="))
        for i, row in enumerate(stored):
            values = row.parts[part]
            padded[i][tuple(slice(size) for size in values.shape)] = values
        parts[part] = torch.from_numpy(padded)
    return Quantised(field.codec, (len(stored), *shape), parts)
