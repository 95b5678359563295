"""Where logit targets meet cache and jobs: their fields, the tensors a cache keeps once for them, and numbers to draw by.

Shapes: A answers, M calibration answers, D teacher width, N vocabulary, J draws.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from alignkd.cache_store.rows.spec import FieldSpec
from alignkd.pipeline.cache_io.tensor_arrays import to_array, to_tensor
from alignkd.pipeline.config.cache_layout import LOGIT_TENSOR
from alignkd.targets.logits import LOGIT_CODECS, Calibration, LogitCodec, LogitSettings


def clamped_to_teacher(settings: LogitSettings, vocabulary: int, width: int) -> LogitSettings:
    """No more kept tokens than there are, no more bytes of a sketch than a hidden state has features.

    ``vocabulary``: columns of the teacher's output head.

    Raises:
        ValueError: the settings are for more ids than that.
    """
    wanted = vocabulary if settings.vocabulary is None else settings.vocabulary
    if wanted > vocabulary:
        raise ValueError(
            f"--logit-vocabulary {wanted}: the teacher's output head has {vocabulary} columns; give as many as the student's"
            " head has, or leave the option out"
        )
    changes = {"top_k": min(settings.top_k, wanted), "sketch_bytes": min(settings.sketch_bytes, width)}
    return LogitSettings(**{**vars(settings), **changes})


def logit_fields(settings: LogitSettings, vocabulary: int) -> tuple[FieldSpec, ...]:
    """The fields of a row, one entry an answer token. ``vocabulary``: columns of the output head."""
    shapes = LOGIT_CODECS[settings.kind].fields(settings, settings.vocabulary or vocabulary)
    return tuple(FieldSpec(name, ("A", *shape.dims), shape.dtype, shape.codec) for name, shape in shapes.items())


def settings_of(fingerprint: Mapping[str, Any]) -> LogitSettings:
    """The settings a cache was written with.

    Raises:
        ValueError: it describes none.
    """
    found = fingerprint["targets"]["logits"]
    try:
        return LogitSettings(**{name: value for name, value in found.items() if value is not None})
    except TypeError as error:
        raise ValueError(f"the cache describes logit targets {found!r}, which are none: write another cache") from error


def logit_arrays(settings: LogitSettings, calibration: Calibration) -> dict[str, np.ndarray]:
    """The tensors that a cache keeps once, by name; the bits of bfloat16 as uint16."""
    tensors = LOGIT_CODECS[settings.kind].calibrate(settings, calibration)
    return {LOGIT_TENSOR.format(name): to_array(tensor.cpu()) for name, tensor in tensors.items()}


def open_codec(settings: LogitSettings, arrays: Mapping[str, np.ndarray], device: torch.device | str) -> LogitCodec:
    """The codec with its tensors on a device."""
    kind = LOGIT_CODECS[settings.kind]
    return kind(settings, {name: to_tensor(arrays[LOGIT_TENSOR.format(name)]) for name in kind.tensor_names()}).to(device)
