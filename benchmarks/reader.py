"""Rows a second out of a cache in shuffled order, on one core, for each shard format.

The rows are those of a MobileVLM teacher with head-mean attention: 200 text rows, 144 vision tokens, 100 answer tokens,
64 of 32,000 logits each (about 54 kB before compression). They are drawn, not a teacher's, but about as hard to compress:
noisy attention, Zipf-distributed ids, decaying log-probabilities.

Example: OMP_NUM_THREADS=1 python benchmarks/reader.py --folder /scratch/reader
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np

from alignkd.cache_store.plan import Plan
from alignkd.cache_store.reader import CacheReader
from alignkd.cache_store.row import Row
from alignkd.cache_store.spec import CacheSpec
from alignkd.cache_store.store import CacheStore
from alignkd.pipeline.loader import SHARDS_OPEN
from alignkd.pipeline.order import epoch_order
from alignkd.pipeline.targets_io import TargetSettings

TEXT, VISION, ANSWERS, KEPT, VOCABULARY = 200, 144, 100, 64, 32_000


def make_row(key: str, generator: np.random.Generator) -> Row:
    scores = generator.normal(0, 1.5, (1, TEXT, VISION)).astype(np.float32)
    attention = np.exp(scores)
    logits = -np.sort(generator.exponential(3.0, (ANSWERS, KEPT)).astype(np.float32), axis=1)
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True) * 1.05)
    ids = np.minimum(generator.zipf(1.3, (ANSWERS, KEPT)), VOCABULARY - 1)
    values = {
        "input_ids": generator.integers(0, VOCABULARY, TEXT, dtype=np.int32),
        "labels": generator.integers(0, VOCABULARY, TEXT, dtype=np.int32),
        "attention": attention / (attention.sum(2, keepdims=True) * 1.5),
        "topk_ids": ids.astype(np.uint16),
        "topk_logprobs": logprobs.astype(np.float32),
        "tail_logmass": np.full(ANSWERS, np.log(0.05), np.float32),
    }
    return Row(key, f"sample {key[:8]}", "0" * 64, values)


def write_cache(url: str, shard_format: str, rows: int, shard_samples: int) -> CacheStore:
    generator = np.random.default_rng(0)
    keys = generator.integers(0, 256, (rows, 16), dtype=np.uint8)
    settings = TargetSettings(("attention", "logits"), "mean", attention_codec="int8-rows")
    spec = CacheSpec(settings.fields(VOCABULARY), {"teacher": "drawn"})
    store = CacheStore.create_or_open(url, spec, Plan(keys, shard_samples, {}), shard_format=shard_format)
    for number in store.pending():
        store.commit_shard(number, [make_row(key, generator) for key in store.plan.keys_of(number)], [])
    return store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--shard-samples", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    for shard_format in ("zarr", "webdataset"):
        url = str(arguments.folder / shard_format)
        status = write_cache(url, shard_format, arguments.rows, arguments.shard_samples).status()
        rates = []
        for epoch in range(arguments.repeats):
            reader = CacheReader(url, max_shards=SHARDS_OPEN + 2)
            order = epoch_order(reader.shards_of(reader.plan.keys), seed=0, epoch=epoch, window=SHARDS_OPEN)
            keys = [reader.plan.keys[i].tobytes().hex() for i in order]
            started = time.perf_counter()
            count = sum(row.values["attention"].shape[0] for row in reader.rows(keys))
            rates.append(count / (time.perf_counter() - started))
        figures = {
            "format": shard_format,
            "rows": status.samples_done,
            "decoded_bytes_a_row": sum(status.decoded_bytes_by_field.values()) // status.samples_done,
            "stored_bytes_a_row": status.total_bytes // status.samples_done,
            "rows_per_second": [round(rate) for rate in rates],
            "answer_tokens_per_second": [round(rate * ANSWERS) for rate in rates],
        }
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
