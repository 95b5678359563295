"""The teacher's projector in a cache: kept once, beside the vision tokens that it gave, for students that see through it.

A cache of vision tokens has two tensors for it: a description, JSON in bytes, and the weights, flat, in the teacher's dtype and
in the order of their names. They follow from the teacher, so that the fingerprint does not name them. A cache written with
``--alignment slice`` holds the weights as a part of its slice. MobileVLM V2 7B: 19 million numbers, 38 MB in 16 bits.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.capture.teacher_slice import projector_of, projector_state, same_tower, slice_config
from alignkd.errors import CacheError, ConfigError
from alignkd.models.modules.mobilevlm import MobileVlm
from alignkd.models.vlm import Vlm, module_fingerprint
from alignkd.pipeline.cache_io.tensor_arrays import to_array, to_tensor
from alignkd.pipeline.config.cache_layout import PROJECTOR_TENSOR, is_slice
from alignkd.pipeline.runtime.devices import parse_dtype

_DESCRIPTION, _WEIGHTS = PROJECTOR_TENSOR.format("description"), PROJECTOR_TENSOR.format("weights")
_SLICED = "slice.projector"
_MOST_BYTES = 1 << 20


def projector_arrays(teacher: Vlm) -> dict[str, np.ndarray]:
    """The tensors that a cache keeps of the teacher's projector; none for families that no student can see through.

    Raises:
        CheckpointError: it holds numbers that are not finite.
    """
    if not isinstance(teacher.model, MobileVlm) or teacher.teacher_projector is not None:
        return {}
    tower = {"sha256": module_fingerprint(teacher.tower)}
    description = json.dumps({**slice_config(teacher.model), "tower": tower}, sort_keys=True).encode()
    return {_DESCRIPTION: np.frombuffer(description, np.uint8), _WEIGHTS: to_array(projector_state(teacher))}


def see_through_teacher(student: Vlm, readers: Sequence[CacheReader], *, seed: int) -> None:
    """Let the student see through the projector in the caches, with a new linear map behind it, drawn from ``seed``.

    A student that sees through it already keeps its map.

    Raises:
        CacheError: a cache has no such projector.
        ConfigError: the student has another tower, other preprocessing or another family than the teacher, sees through the
            projector of another teacher, or two caches have different ones.
    """
    if not readers:
        if student.teacher_projector is None:
            raise ConfigError("projector teacher takes the teacher's projector from the cache: give --cache")
        return
    first, dtype, flat = _read(readers[0])
    for reader in readers[1:]:
        other, _, weights = _read(reader)
        if other["features"] != first["features"] or not torch.equal(weights, flat):
            raise ConfigError(
                f"the caches {readers[0].url} and {reader.url} hold the projectors of different teachers, and a student sees"
                " through one: give caches of one teacher, or use projector own"
            )
    _check_tower(student, readers[0], first, dtype)
    try:
        projector = projector_of(first, flat)
    except (KeyError, TypeError) as error:
        raise _damaged(readers[0]) from error
    if (seen := student.teacher_projector) is not None:
        if module_fingerprint(seen.teacher, dtype) != module_fingerprint(projector):
            raise ConfigError(
                f"the student {student.folder} sees through the projector of another teacher than that of the cache at"
                f" {readers[0].url}: use that teacher's cache, or a student with its own projector"
            )
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student.see_through(projector, first["features"], int(first["text"]["hidden_size"]))


def _check_tower(student: Vlm, reader: CacheReader, description: Mapping[str, Any], dtype: torch.dtype) -> None:
    found = reader.fingerprint
    family = found["teacher"].get("family", student.family)
    if family != student.family:
        raise ConfigError(
            f"projector teacher: the cache at {reader.url} is of a teacher of the family {family}, and the student is of"
            f" {student.family}: they must be one family with one tower; use projector own"
        )
    try:
        same = same_tower(student, description, str(description["tower"]["sha256"]), dtype)
    except (KeyError, TypeError) as error:
        raise _damaged(reader) from error
    if not same:
        raise ConfigError(
            f"projector teacher: the student's vision tower is not that of the teacher (in {reader.url}: sha256"
            f" {description['tower']['sha256'][:12]} in {found['teacher']['dtype']}), whose projector reads its features: use a"
            " student with the teacher's tower, or projector own"
        )
    if found.get("image_preprocessing", "") != student.image_fingerprint():
        raise ConfigError(
            f"projector teacher: the student prepares images otherwise than the teacher of the cache at {reader.url}: give it"
            " the teacher's preprocessor_config.json, or use projector own"
        )


def _read(reader: CacheReader) -> tuple[dict[str, Any], torch.dtype, torch.Tensor]:
    """The description of the projector in a cache, its dtype, and its weights.

    Raises:
        CacheError: there is none, or it is damaged.
    """
    fingerprint, names = reader.fingerprint, reader.tensors.keys()
    sliced = is_slice(fingerprint)
    if not sliced and _WEIGHTS not in names:
        raise CacheError(
            f"the cache at {reader.url} holds no projector of its teacher: it has no vision tokens, was written by an earlier"
            " version, or the teacher's family has none that a student can see through. Write it again with --targets that"
            " include vision, or use projector own"
        )
    try:
        content = fingerprint["slice"] if sliced else json.loads(bytes(reader.tensors[_DESCRIPTION][:_MOST_BYTES]))
        dtype = parse_dtype(fingerprint["teacher"]["dtype"])
        flat = to_tensor(reader.tensors[_SLICED if sliced else _WEIGHTS])
        if flat.dtype != dtype or not isinstance(content["features"], dict):
            raise TypeError(f"{flat.dtype} where the teacher ran in {dtype}")
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(reader) from error
    return content, dtype, flat


def _damaged(reader: CacheReader) -> CacheError:
    return CacheError(
        f"the cache at {reader.url} does not describe its teacher's projector: it is damaged; run alignkd cache verify"
    )
