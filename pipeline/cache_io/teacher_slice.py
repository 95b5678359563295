"""The teacher's slice in a cache: what stage one keeps of the teacher, and how stage two opens it.

The rows of a cache written with ``--alignment slice`` hold no attention and no vision tokens. Its fingerprint describes the
slice, and each group of the slice is one tensor of the cache. The whole embedding is kept: which ids the data uses is known
only when all of it is tokenised, long after the first shard, and real data uses most of 32,000 Llama tokens. In 16 bits they
are 262 MB a cache, 400 bytes a sample at 665,000 samples.
"""

from collections.abc import Mapping, Set
from typing import Any

import numpy as np
import torch

from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.capture.teacher_slice import GROUPS, TOWER, TeacherSlice, same_tower, slice_config, slice_tensors
from alignkd.errors import CacheError, ConfigError
from alignkd.models.vlm import Vlm, module_fingerprint
from alignkd.pipeline.cache_io.tensor_arrays import to_array, to_tensor
from alignkd.pipeline.config.cache_layout import ALIGNMENTS, SLICED, is_slice
from alignkd.pipeline.config.fingerprint_keys import check_fingerprint_keys
from alignkd.pipeline.runtime.devices import parse_dtype

_NAME = "slice.{}"


def check_slice_options(alignment: str, targets: Set[str], *, without_tower: bool) -> None:
    """Refuse values of ``--alignment``, ``--targets`` and ``--slice-without-tower`` that contradict each other.

    Raises:
        ConfigError: names them.
    """
    if alignment not in ALIGNMENTS:
        raise ConfigError(f"--alignment {alignment}: known are {', '.join(ALIGNMENTS)}")
    if alignment == "slice" and not targets & SLICED:
        raise ConfigError(
            f"--alignment slice replaces attention and vision tokens, but --targets {','.join(sorted(targets))} has neither:"
            " add one of them to --targets, or leave --alignment out"
        )
    if without_tower and alignment != "slice":
        raise ConfigError("--slice-without-tower needs --alignment slice")


def slice_fingerprint(teacher: Vlm, *, tower: bool) -> dict[str, Any]:
    """The slice's shape, the digest of its tower, and whether the cache holds that tower."""
    return {**slice_config(teacher.model), "tower": {"sha256": module_fingerprint(teacher.tower), "in_cache": tower}}


def slice_arrays(teacher: Vlm, *, tower: bool) -> dict[str, np.ndarray]:
    """The tensors that a cache keeps once, by name; the bits of bfloat16 as uint16.

    Raises:
        ValueError: this teacher has no slice, or holds numbers that are not finite.
    """
    return {_NAME.format(group): to_array(flat) for group, flat in slice_tensors(teacher, tower=tower).items()}


def open_slice(reader: CacheReader, student: Vlm, needs: Set[str], *, features_only: bool) -> TeacherSlice | None:
    """The slice of a cache, on the student's device; None where the cache holds targets or the recipe needs none of them.

    ``features_only``: batches will carry the student's tower features and no pixel values.

    Raises:
        CacheError: the student has another tower and the cache holds none, or the cache is damaged.
        ConfigError: the student has another tower, and batches will carry no pixel values.
    """
    fingerprint = reader.fingerprint
    if not is_slice(fingerprint) or not needs & SLICED:
        return None
    check_fingerprint_keys(fingerprint, "teacher", "targets", cache=reader.url)
    try:
        description, dtype = fingerprint["slice"], parse_dtype(fingerprint["teacher"]["dtype"])
        _check_shape(description, fingerprint)
        digest, in_cache = str(description["tower"]["sha256"]), bool(description["tower"]["in_cache"])
        shared = same_tower(student, description, digest, dtype)
    except (KeyError, TypeError) as error:
        raise CacheError(
            f"the cache at {reader.url} does not describe its slice: {error!r}; write another cache with alignkd cache-teacher"
        ) from error
    if not shared and not in_cache:
        raise CacheError(
            f"the cache at {reader.url} holds the teacher's slice without its vision tower {digest[:12]}, and the student's"
            " tower is another: use a student with the teacher's tower, or cache again without --slice-without-tower"
        )
    if not shared and features_only:
        raise ConfigError(
            f"--cache-tower-features keeps the features of the student's tower, but the teacher's tower {digest[:12]} is"
            " another and needs the images: leave it out"
        )
    tensors = {group: _read_group(reader, group, dtype) for group in GROUPS if not (shared and group == TOWER)}
    head_mean = fingerprint["targets"]["attention"] == "mean"
    return TeacherSlice(description, tensors, device=student.device, head_mean=head_mean)


def _check_shape(description: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> None:
    """Compare the slice's shape with that of its teacher, which was compared with the student before.

    Raises:
        CacheError: they differ.
        KeyError, TypeError: the slice is not described.
    """
    text, teacher = description["text"], fingerprint["teacher"]
    vision_tokens = description["features"]["projector_grid"] ** 2
    described = (text["vocab_size"], text["num_attention_heads"], text["hidden_size"], vision_tokens)
    expected = (teacher["vocabulary"], teacher["heads"], teacher["width"], fingerprint["vision_tokens_per_image"])
    if described != expected:
        raise CacheError(
            f"the cache's slice has vocabulary, heads, width and vision tokens {described}, its teacher {expected}: write"
            " another cache"
        )


def _read_group(reader: CacheReader, group: str, dtype: torch.dtype) -> torch.Tensor:
    flat = to_tensor(reader.tensors[_NAME.format(group)])
    if flat.dtype != dtype:
        raise CacheError(f"the cache's slice holds {flat.dtype}, but its teacher ran in {dtype}: write another cache")
    return flat
