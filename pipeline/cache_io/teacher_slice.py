"""Where the teacher's slice meets cache and jobs: what stage one keeps of the teacher, and what stage two makes of it.

A cache written with ``--alignment slice`` holds no attention and no vision tokens in its rows; its fingerprint describes the
slice, and each group of the slice is one tensor of the cache. All rows of the embedding are kept: which ids the data uses is
known only when all of it is tokenised, long after the first shard, and of 32,000 Llama tokens real data uses most; in 16 bits
they are 262 MB a cache, 400 bytes a sample at 665,000 samples.
"""

from collections.abc import Set
from typing import Any

import numpy as np
import torch

from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.capture.teacher_slice import GROUPS, TOWER, TeacherSlice, same_tower, slice_config, slice_tensors
from alignkd.models.vlm import Vlm, module_fingerprint
from alignkd.pipeline.cache_io.tensor_arrays import to_array, to_tensor
from alignkd.pipeline.config.cache_layout import ALIGNMENTS, SLICED, is_slice
from alignkd.pipeline.runtime.devices import parse_dtype

_NAME = "slice.{}"


def check_alignment(alignment: str, targets: Set[str], *, without_tower: bool) -> None:
    """Refuse options that contradict each other.

    Raises:
        ValueError: names them.
    """
    if alignment not in ALIGNMENTS:
        raise ValueError(f"--alignment {alignment}: known are {', '.join(ALIGNMENTS)}")
    if alignment == "slice" and not targets & SLICED:
        raise ValueError(
            f"--alignment slice is about attention and vision tokens, but --targets {','.join(sorted(targets))} wants neither:"
            " leave it out, or add them to --targets"
        )
    if without_tower and alignment != "slice":
        raise ValueError("--slice-without-tower needs --alignment slice")


def slice_fingerprint(teacher: Vlm, *, tower: bool) -> dict[str, Any]:
    """The slice's shape, its tower's digest, and whether the cache holds that tower."""
    return {**slice_config(teacher.model), "tower": {"sha256": module_fingerprint(teacher.tower), "in_cache": tower}}


def slice_arrays(teacher: Vlm, *, tower: bool) -> dict[str, np.ndarray]:
    """The tensors that a cache keeps once, by name; the bits of bfloat16 as uint16.

    Raises:
        ValueError: this teacher cannot be sliced, or holds numbers that are not finite.
    """
    return {_NAME.format(group): to_array(flat) for group, flat in slice_tensors(teacher, tower=tower).items()}


def open_slice(reader: CacheReader, student: Vlm, needs: Set[str], *, features_only: bool) -> TeacherSlice | None:
    """The slice of a cache on the student's device; None where the cache holds targets, or the recipe needs none of them.

    ``features_only``: batches will carry the student's tower features, no pixel values.

    Raises:
        ValueError: the student has another tower where the cache has none or pixel values lack, or the cache is damaged.
    """
    found = reader.fingerprint
    if not is_slice(found) or not needs & SLICED:
        return None
    try:
        about, dtype = found["slice"], parse_dtype(found["teacher"]["dtype"])
        _check_consistent(about, found)
        in_cache, sha256 = bool(about["tower"]["in_cache"]), str(about["tower"]["sha256"])
        shared, theirs = same_tower(student, about, sha256, dtype), sha256[:12]
    except (KeyError, TypeError) as error:
        raise ValueError(f"the cache at {reader.url} does not describe its slice: {error!r}; write another") from error
    if not shared and not in_cache:
        raise ValueError(
            f"the cache at {reader.url} holds the teacher's slice without its vision tower {theirs}, and the student's tower is"
            " another: use a student with the teacher's tower, or cache again without --slice-without-tower"
        )
    if not shared and features_only:
        raise ValueError(
            f"--cache-tower-features keeps the features of the student's tower, but the teacher's tower {theirs} is another"
            " and needs the images: leave it out"
        )
    tensors = {group: _read_group(reader, group, dtype) for group in GROUPS if not (shared and group == TOWER)}
    head_mean = found["targets"]["attention"] == "mean"
    return TeacherSlice(about, tensors, device=student.device, head_mean=head_mean)


def _check_consistent(about: dict[str, Any], found: dict[str, Any]) -> None:
    """The fingerprint was compared with the student: the slice has to be of the same shape."""
    text, teacher = about["text"], found["teacher"]
    described = (text["vocab_size"], text["num_attention_heads"], text["hidden_size"], about["features"]["projector_grid"] ** 2)
    expected = (teacher["vocabulary"], teacher["heads"], teacher["width"], found["vision_tokens_per_image"])
    if described != expected:
        raise ValueError(
            f"the cache's slice has vocabulary, heads, width and vision tokens {described}, its teacher {expected}: write"
            " another cache"
        )


def _read_group(reader: CacheReader, group: str, dtype: torch.dtype) -> torch.Tensor:
    flat = to_tensor(reader.tensors[_NAME.format(group)])
    if flat.dtype != dtype:
        raise ValueError(f"the cache's slice holds {flat.dtype}, its teacher ran in {dtype}: write another cache")
    return flat
