"""What stage one would cost: samples, bytes and hours, from a few real samples; nothing is written.

And what other options would make of the same samples: each is encoded for real, none is guessed.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from alignkd.cache_store.formats.registry import get_format
from alignkd.cache_store.rows.encode import concatenate_rows, encode_row
from alignkd.cache_store.rows.row import Rejected, Row
from alignkd.cache_store.rows.spec import CacheSpec, FieldSpec
from alignkd.capture.teacher_slice import check_sliceable, slice_config, slice_sizes
from alignkd.pipeline.cache_admin.status import dense_bytes
from alignkd.pipeline.config.cache_layout import logit_width
from alignkd.pipeline.config.cache_teacher import CacheTeacherConfig
from alignkd.pipeline.stage_one.halve_on_oom import HalvingRunner
from alignkd.pipeline.stage_one.shard_work import rows
from alignkd.pipeline.stage_one.teacher_stage import StageOne

_RUN = 8
"""Samples in a row that are tried together: samples of one image are neighbours, and share what depends on it alone."""


def dry_run(config: CacheTeacherConfig, probe: int = 32) -> dict[str, Any]:
    """Plan, size and time, estimated from real samples spread over the data.

    Raises:
        ValueError: bad input, or none of the samples tried can be used.
    """
    stage = StageOne.open(config)
    tensors = stage.tensors()
    stage.use_tensors(tensors)
    chosen = spread(stage.plan.samples, probe)
    made, rejected, positions, seconds = _try(stage, chosen)
    if not made:
        first = rejected[0]
        raise ValueError(f"none of {len(chosen)} samples tried can be used. First: {first.sample_id}: {first.reason}")
    total, spec, format_name = stage.plan.samples, stage.spec(), config.shard_format
    stored = sizes(spec, made, format_name)
    kept_once = sum(array.nbytes for array in tensors.values())
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
        "rejected_of_tried": len(rejected),
        "positions_per_sample": round(positions / len(made), 1),
        "bytes_per_sample": round(sum(stored.values())),
        "bytes_per_sample_by_field": {name: round(size) for name, size in stored.items()},
        "dense_bytes_per_sample_by_field": {name: round(size / len(made)) for name, size in dense.items()},
        "tensor_bytes": kept_once,
        "bytes": round(rows_bytes + kept_once),
        "bytes_with_option": {name: size + kept_once for name, size in options.items()},
        "saves_most": min(options, key=lambda name: options[name]) if options else None,
        "seconds_per_sample": round(seconds / len(made), 6),
        "hours": round(seconds / len(made) * total / 3600, 4),
    }


def spread(samples: int, probe: int) -> list[int]:
    """Places of the plan, in runs of neighbours spread over all of it."""
    if samples <= probe:
        return list(range(samples))
    starts = np.linspace(0, samples - _RUN, max(probe // _RUN, 1)).astype(int).tolist()
    return sorted({start + i for start in starts for i in range(_RUN)})


def _try(stage: StageOne, chosen: Sequence[int]) -> tuple[list[Row], list[Rejected], int, float]:
    """Rows and rejected samples, positions, and the seconds that the teacher took."""
    work = stage.lay_out_samples(0, chosen)
    ready = [stage.load(batch) for batch in work.batches]
    rejected = [*work.rejected, *(sample for batch in ready for sample in batch.rejected)]
    runner, made = HalvingRunner(stage), []
    started = time.perf_counter()
    for batch in ready:
        outputs, unfit = runner.run(batch)
        made += [row for part, output in outputs for row in rows(part, output)]
        rejected += unfit
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    order = {stage.samples[place].key: place for place in chosen}
    made.sort(key=lambda row: order[row.key])
    return made, rejected, sum(item.length for batch in ready for item, _ in batch.items), seconds


def sizes(spec: CacheSpec, made: Sequence[Row], format_name: str) -> dict[str, float]:
    """Stored bytes a sample of each field, and of the rest of a shard."""
    shard_format = get_format(format_name)
    data = shard_format.write_shard(concatenate_rows(spec, [encode_row(spec, row) for row in made]))
    found = shard_format.field_bytes(spec, data)
    found["index"] = len(data) - sum(found.values())
    return {name: size / len(made) for name, size in found.items()}


def _options(stage: StageOne, made: Sequence[Row], stored: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """Options that were not chosen, and by how many bytes each would change the cache."""
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
    gone = sum(stored[name] for name in ("attention", "vision_tokens", "spans", "regions") if name in fields) * total
    if gone and stage.config.settings.attention_layers == (0,) and _sliceable(stage):
        parameters = sum(slice_sizes(slice_config(stage.teacher.model)).values())
        yield "--alignment slice", parameters * next(stage.teacher.model.parameters()).element_size() - gone
    if "sketch" in fields and (size := stage.row_settings.logits.sketch_bytes) > 32:
        answers = sum(len(row.values["sketch"]) for row in made) / len(made)
        yield "--sketch-bytes 32", (32 - size) * answers * total


def _sliceable(stage: StageOne) -> bool:
    try:
        check_sliceable(stage.teacher)
    except ValueError:
        return False
    return True
