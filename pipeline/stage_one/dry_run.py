"""Estimate stage one from a few real samples: bytes and hours, and bytes with other options. Nothing is written.

For other options the same samples are encoded again: sizes are measured, not guessed.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from alignkd.cache_store.formats.registry import get_format
from alignkd.cache_store.protocol.store import open_store
from alignkd.cache_store.rows.encode import concatenate_rows, encode_row
from alignkd.cache_store.rows.row import Rejected, Row
from alignkd.cache_store.rows.spec import CacheSpec, FieldSpec
from alignkd.cache_store.storage import open_storage
from alignkd.cache_store.storage.local import LocalStorage
from alignkd.capture.teacher_slice import PROJECTOR, check_sliceable, slice_config, slice_sizes
from alignkd.errors import AlignkdError, DataError, SampleError
from alignkd.pipeline.cache_admin.room import check_room, free_bytes
from alignkd.pipeline.cache_admin.sight import SIGHT
from alignkd.pipeline.cache_admin.status import dense_bytes
from alignkd.pipeline.config.cache_layout import logit_width
from alignkd.pipeline.config.cache_teacher import CacheTeacherConfig
from alignkd.pipeline.stage_one.appended_samples import SamplesOfPlan
from alignkd.pipeline.stage_one.checks.sight import look
from alignkd.pipeline.stage_one.halve_on_oom import HalvingRunner
from alignkd.pipeline.stage_one.shard_work import not_finite, rows
from alignkd.pipeline.stage_one.teacher_stage import StageOne
from alignkd.plugins import load_plugins

_LOOKED_AT = 64
"""Samples whose texts bound the size of a cache."""

_NEIGHBOURS = 8
"""Samples in a row that are tried together: samples of one image are neighbours, and share its per-image fields."""


def dry_run(config: CacheTeacherConfig, probe: int = 32) -> dict[str, Any]:
    """Plan, size and time, estimated from ``probe`` real samples spread over the data.

    Raises:
        AlignkdError: bad input, or none of the samples tried can be used.
    """
    load_plugins(config.plugins)
    stage = StageOne.open(config)
    made_once = only_appended(stage) if config.append else stage.tensors()
    stage.use_tensors(open_store(config.cache).tensors if config.append else made_once)
    chosen = spread(stage.plan.samples, probe)
    trial = _try(stage, chosen)
    made = trial.rows
    if not made:
        first = trial.rejected[0]
        raise DataError(
            f"none of {len(chosen)} samples tried can be used. First: {first.sample_id}: {first.reason}. Check --images and"
            " the data"
        )
    total, spec, format_name = stage.plan.samples, stage.spec(), config.shard_format
    stored = sizes(spec, made, format_name)
    kept_once = sum(array.nbytes for array in made_once.values())
    rows_bytes = sum(stored.values()) * total
    options = {name: round(rows_bytes + difference) for name, difference in _options(stage, made, stored)}
    decoded = {f.name: sum(row.values[f.name].size for row in made) * f.numpy_dtype.itemsize for f in spec.fields}
    dense = dense_bytes(decoded, logit_width(spec.fingerprint), stage.teacher.hidden_size)
    return {
        "samples": total,
        "records": stage.plan.meta["records"],
        "shards": stage.plan.shards,
        "template": stage.template,
        "tried": len(chosen),
        "rejected_of_tried": len(trial.rejected),
        "truncated_of_tried": trial.truncated,
        "positions_per_sample": round(trial.positions / len(made), 1),
        "bytes_per_sample": round(sum(stored.values())),
        "bytes_per_sample_by_field": {name: round(size) for name, size in stored.items()},
        "dense_bytes_per_sample_by_field": {name: round(size / len(made)) for name, size in dense.items()},
        "tensor_bytes": kept_once,
        "bytes": round(rows_bytes + kept_once),
        "bytes_with_option": {name: size + kept_once for name, size in options.items()},
        "saves_most": min(options, key=lambda name: options[name]) if options else None,
        "seconds_per_sample": round(trial.seconds / len(made), 6),
        "hours": round(trial.seconds / len(made) * total / 3600, 4),
        SIGHT: look(stage),
    }


def only_appended(stage: StageOne) -> dict[str, np.ndarray]:
    """Have a stage plan the samples alone that would be appended. Returns what the cache would keep once for them: nothing.

    Raises:
        DataError: the cache has them all.
    """
    assert isinstance(stage.samples, SamplesOfPlan)
    if not stage.samples.at(open_store(stage.config.cache).plan).lacking:
        raise DataError(f"every sample of {stage.config.data} is in the cache at {stage.config.cache} already: nothing to do")
    stage.plan = stage.plan.parts[-1]
    stage.samples = stage.samples.at(stage.plan)
    return {}


def spread(samples: int, probe: int) -> list[int]:
    """Positions in the plan: groups of neighbours, spread over all of it."""
    if samples <= probe:
        return list(range(samples))
    starts = np.linspace(0, samples - _NEIGHBOURS, max(probe // _NEIGHBOURS, 1)).astype(int).tolist()
    return sorted({start + i for start in starts for i in range(_NEIGHBOURS)})


@dataclass(frozen=True)
class _Trial:
    """Rows of the samples tried in the order of the plan, how many were truncated, and the seconds the teacher took."""

    rows: list[Row]
    rejected: list[Rejected]
    truncated: int
    positions: int
    seconds: float


def _try(stage: StageOne, chosen: Sequence[int]) -> _Trial:
    work = stage.batch_samples(0, chosen)
    ready = [stage.load(batch) for batch in work.batches]
    rejected = [*work.rejected, *(sample for batch in ready for sample in batch.rejected)]
    runner, made, truncated = HalvingRunner(stage), list[Row](), 0
    started = time.perf_counter()
    for batch in ready:
        outputs, too_large = runner.run(batch)
        made += [row for part, output in outputs for row in rows(part, output)]
        rejected += [sample for part, output in outputs for sample in not_finite(part, output)]
        truncated += sum(part.truncated for part, _ in outputs)
        rejected += too_large
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    order = {stage.samples[position].key: position for position in chosen}
    made.sort(key=lambda row: order[row.key])
    positions = sum(planned.length for batch in ready for planned, _ in batch.samples)
    return _Trial(made, rejected, truncated, positions, seconds)


def check_room_for_plan(stage: StageOne, tensors: Mapping[str, np.ndarray]) -> None:
    """Refuse a cache that starts where there is no room for it. Rows are made for that only where their bound does not fit.

    Raises:
        ConfigError: both sizes, and what to do.
    """
    stage.use_tensors(tensors)
    storage = open_storage(stage.config.cache)
    kept_once = sum(array.nbytes for array in tensors.values())
    if not isinstance(storage, LocalStorage) or _largest_size(stage) + kept_once <= free_bytes(storage.root):
        return
    made = _try(stage, spread(stage.plan.samples, _NEIGHBOURS)).rows
    if made:
        per_sample = sum(sizes(stage.spec(), made, stage.config.shard_format).values())
        check_room(storage, round(per_sample * stage.plan.samples) + kept_once)


def _largest_size(stage: StageOne) -> int:
    """Bytes that the rows of a plan can never pass, from the lengths of a few texts and the shapes of the fields."""
    plan, per_sample = stage.plan, list[int]()
    fields = stage.spec().fields
    for position in range(0, plan.samples, max(1, plan.samples // _LOOKED_AT)):
        with contextlib.suppress(SampleError):
            length = stage.preparer.text(stage.samples[position]).length
            per_sample.append(sum(_values(field.dims, length, stage) * 4 for field in fields))
    return sum(per_sample) * plan.samples // max(len(per_sample), 1)


def _values(dims: Sequence[str | int], length: int, stage: StageOne) -> int:
    logits = stage.row_settings.logits
    fixed = {"H": stage.teacher.heads, "D": stage.teacher.hidden_size, "K": logits.top_k, "J": logits.draws}
    count = 1
    for dim in dims:
        count *= int(dim) if str(dim).isdecimal() else fixed.get(str(dim), logits.sketch_bytes if dim == "S" else length)
    return count


def sizes(spec: CacheSpec, made: Sequence[Row], format_name: str) -> dict[str, float]:
    """Stored bytes a sample of each field, and of the rest of a shard (``index``)."""
    shard_format = get_format(format_name)
    data = shard_format.write_shard(concatenate_rows(spec, [encode_row(spec, row) for row in made]))
    stored = shard_format.field_bytes(spec, data)
    stored["index"] = len(data) - sum(stored.values())
    return {name: size / len(made) for name, size in stored.items()}


def _options(stage: StageOne, made: Sequence[Row], stored: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """Options that were not chosen, and the bytes by which each would change the cache."""
    total, fields = stage.plan.samples, {field.name: field for field in stage.spec().fields}

    def change(name: str, field: FieldSpec, values: Sequence[np.ndarray]) -> float:
        others = [replace(row, values={name: value}) for row, value in zip(made, values, strict=True)]
        return (sizes(CacheSpec((field,), {}), others, stage.config.shard_format)[name] - stored[name]) * total

    if "attention" in fields and stage.config.settings.attention_layers == (0,):
        maps = [row.values["attention"] for row in made]
        if stage.config.settings.attention == "per-head":
            means = [attention_HTV.mean(axis=0, keepdims=True) for attention_HTV in maps]
            yield "--attention mean", change("attention", fields["attention"], means)
        if fields["attention"].codec != "sqrt4":
            yield "--attention-codec sqrt4", change("attention", replace(fields["attention"], codec="sqrt4"), maps)
    if "vision_tokens" in fields and fields["vision_tokens"].codec != "int4-blocks":
        tokens = [row.values["vision_tokens"] for row in made]
        smaller = replace(fields["vision_tokens"], codec="int4-blocks")
        yield "--vision-codec int4-blocks", change("vision_tokens", smaller, tokens)
    dropped = sum(stored[name] for name in ("attention", "vision_tokens", "spans", "regions") if name in fields) * total
    if dropped and stage.config.settings.attention_layers == (0,) and _sliceable(stage):
        parts = slice_sizes(slice_config(stage.teacher.model))
        # A cache of vision tokens has the projector already.
        parameters = sum(parts.values()) - ("vision_tokens" in fields) * parts[PROJECTOR]
        yield "--alignment slice", parameters * next(stage.teacher.model.parameters()).element_size() - dropped
    if "sketch" in fields and (size := stage.row_settings.logits.sketch_bytes) > 32:
        answers = sum(len(row.values["sketch"]) for row in made) / len(made)
        yield "--sketch-bytes 32", (32 - size) * answers * total


def _sliceable(stage: StageOne) -> bool:
    try:
        check_sliceable(stage.teacher)
    except AlignkdError:
        return False
    return True
