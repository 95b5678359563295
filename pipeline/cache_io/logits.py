"""Logit targets in a cache: the fields of a row, the tensors a cache keeps once for them, and the codec that reads both.

Shapes: A answers.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from alignkd.cache_store.rows.spec import FieldSpec
from alignkd.errors import CacheError, ConfigError
from alignkd.pipeline.cache_io.tensor_arrays import to_array, to_tensor
from alignkd.pipeline.config.cache_layout import LOGIT_TENSOR
from alignkd.pipeline.config.fingerprint_keys import check_fingerprint_keys
from alignkd.targets.logits import LOGIT_CODECS, Calibration, LogitCodec, LogitSettings


def clamp_to_teacher(settings: LogitSettings, vocabulary: int, width: int) -> LogitSettings:
    """Limit the settings to what the teacher has: ids to keep, and features of a hidden state to sketch.

    ``vocabulary``: columns of the teacher's output head. ``width``: features of its hidden states.

    Raises:
        ConfigError: ``settings.vocabulary`` is more than the head has.
    """
    kept = vocabulary if settings.vocabulary is None else settings.vocabulary
    if kept > vocabulary:
        raise ConfigError(
            f"--logit-vocabulary {kept}: the teacher's output head has {vocabulary} columns; give as many as the student's"
            " head has, or leave the option out"
        )
    changes = {"top_k": min(settings.top_k, kept), "sketch_bytes": min(settings.sketch_bytes, width)}
    return LogitSettings(**{**vars(settings), **changes})


def logit_fields(settings: LogitSettings, vocabulary: int) -> tuple[FieldSpec, ...]:
    """The fields of a row, ``[A, ...]`` each. ``vocabulary``: columns of the output head."""
    shapes = LOGIT_CODECS[settings.kind].fields(settings, settings.vocabulary or vocabulary)
    return tuple(FieldSpec(name, ("A", *shape.dims), shape.dtype, shape.codec) for name, shape in shapes.items())


def settings_of(fingerprint: Mapping[str, Any]) -> LogitSettings:
    """The settings that a cache's logits were written with.

    Raises:
        CacheError: its fingerprint describes no logits.
    """
    check_fingerprint_keys(fingerprint, "targets.logits")
    found = fingerprint["targets"]["logits"]
    try:
        return LogitSettings(**{name: value for name, value in found.items() if value is not None})
    except (AttributeError, TypeError, ValueError) as error:
        raise CacheError(
            f"the cache does not describe its targets: its fingerprint has {found!r} as targets.logits, which are no settings"
            f" of logits ({error}): write another cache with alignkd cache-teacher"
        ) from error


def logit_arrays(settings: LogitSettings, calibration: Calibration) -> dict[str, np.ndarray]:
    """The tensors that a cache keeps once, by name; the bits of bfloat16 as uint16."""
    tensors = LOGIT_CODECS[settings.kind].calibrate(settings, calibration)
    return {LOGIT_TENSOR.format(name): to_array(tensor.cpu()) for name, tensor in tensors.items()}


def open_codec(settings: LogitSettings, arrays: Mapping[str, np.ndarray], device: torch.device | str) -> LogitCodec:
    """The codec, with its tensors on a device.

    Raises:
        CacheError: the cache lacks one of them.
    """
    kind = LOGIT_CODECS[settings.kind]
    names = {name: LOGIT_TENSOR.format(name) for name in kind.tensor_names()}
    lacking = [stored for stored in names.values() if stored not in arrays]
    if lacking:
        raise CacheError(
            f"the cache describes logits of kind {settings.kind!r} but lacks the tensors {', '.join(lacking)}: write another"
            " cache with alignkd cache-teacher"
        )
    return kind(settings, {name: to_tensor(arrays[stored]) for name, stored in names.items()}).to(device)
