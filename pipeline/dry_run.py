"""What stage one would cost: samples, bytes and hours, from a few real samples; nothing is written."""

import time
from typing import Any

import numpy as np
import torch

from alignkd.cache_store.formats import get_format
from alignkd.cache_store.row import Row
from alignkd.cache_store.shard import encode_row, pack
from alignkd.pipeline.fit_memory import FittingRunner
from alignkd.pipeline.stage_one import CacheTeacherConfig, StageOne, rows


def dry_run(config: CacheTeacherConfig, probe: int = 32) -> dict[str, Any]:
    """Plan, size and time, estimated from real samples spread over the data.

    Raises:
        ValueError: bad input, or none of the samples tried can be used.
    """
    stage = StageOne.open(config)
    total = stage.plan.samples
    chosen = np.linspace(0, total - 1, min(probe, total)).astype(int).tolist()
    work = stage.lay_out_samples(0, chosen)
    ready = [stage.load(batch) for batch in work.batches]
    rejected = [*work.rejected, *(sample for batch in ready for sample in batch.rejected)]
    runner = FittingRunner(stage)
    started = time.perf_counter()
    made: list[Row] = []
    for batch in ready:
        outputs, unfit = runner.run(batch)
        made += [row for part, output in outputs for row in rows(part, output)]
        rejected += unfit
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if not made:
        first = rejected[0]
        raise ValueError(f"none of {len(chosen)} samples tried can be used. First: {first.sample_id}: {first.reason}")
    seconds = (time.perf_counter() - started) / len(made)
    spec = stage.spec()
    size = len(get_format(config.shard_format).write_shard(pack(spec, [encode_row(spec, row) for row in made]))) / len(made)
    return {
        "samples": total,
        "records": stage.plan.meta["records"],
        "shards": stage.plan.shards,
        "template": stage.template,
        "tried": len(chosen),
        "rejected_of_tried": len(rejected),
        "positions_per_sample": round(float(np.mean([item.length for batch in ready for item, _ in batch.items])), 1),
        "bytes_per_sample": round(size),
        "bytes": round(size * total),
        "seconds_per_sample": round(seconds, 6),
        "hours": round(seconds * total / 3600, 4),
    }
