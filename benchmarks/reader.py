"""Rows a second out of a cache in shuffled order, on one core, for each shard format.

Rows are what a MobileVLM teacher gives for about 200 text rows, 144 vision tokens and 100 answer tokens: head-mean attention
in 8 bits, the 64 likeliest of 32,000 tokens, token ids and labels; about 50 kB before compression. They are read as stage two
reads them, as small integers, in batches of 16, the shards of a batch fetched side by side. Values are drawn, about as hard to
compress as a teacher's: noisy attention, and steps and log-probabilities of 66 and 31 bytes an answer token (SmolLM2-135M on
English text: 62 and about 30).

Example: OMP_NUM_THREADS=1 python benchmarks/reader.py --folder /scratch/reader
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from alignkd.cache_store.protocol.plan import Plan
from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.cache_store.protocol.store import CacheStore
from alignkd.cache_store.rows.row import Row
from alignkd.cache_store.rows.spec import CacheSpec, FieldSpec
from alignkd.pipeline.feeding.order import WINDOW_SHARDS, BatchOrder

TEXT, VISION, ANSWERS, KEPT, VOCABULARY, BATCH = 200, 144, 100, 64, 32_000, 16
IMAGE = -200
FINGERPRINT = {
    "teacher": {
        "heads": 32,
        "width": 2048,
        "vocabulary": VOCABULARY,
        "image_token_id": IMAGE,
        "tokens_per_placeholder": VISION,
    },
    "targets": {"attention": "mean", "vision": False, "logits": {"kind": "topk", "top_k": KEPT}},
}
FIELDS = (
    FieldSpec("input_ids", ("L",), "int32", "exact"),
    FieldSpec("labels", ("L",), "int32", "exact"),
    FieldSpec("attention", ("H", "T", "V"), "float32", "sqrt8"),
    FieldSpec("topk_rank_steps", ("A", "K"), "uint16", "exact"),
    FieldSpec("topk_logprob_codes", ("A", "K"), "uint8", "exact"),
    FieldSpec("tail_logmass", ("A",), "float32", "float16"),
)


def make_row(key: str, generator: np.random.Generator) -> Row:
    text, answers = TEXT + generator.integers(-40, 41), ANSWERS + generator.integers(-20, 21)
    attention = np.exp(generator.normal(0, 1.5, (1, text, VISION)).astype(np.float32))
    drawn = np.sort((VOCABULARY - KEPT) ** generator.random((answers, KEPT)), axis=1).astype(np.int64)
    # Each rank once.
    ranks = (np.maximum.accumulate(drawn - np.arange(KEPT), axis=1) + np.arange(KEPT)).clip(0).astype(np.uint16)
    codes = np.clip(generator.normal(42, 2.5, (answers, KEPT)), 0, 58).astype(np.uint8)
    ids = (VOCABULARY ** generator.random(text + 1)).astype(np.int32)
    ids[0] = IMAGE
    values = {
        "input_ids": ids,
        "labels": np.where(np.arange(text + 1) > text - answers, ids, -100).astype(np.int32),
        "attention": attention / (attention.sum(2, keepdims=True) * 1.5),
        "topk_rank_steps": np.diff(ranks, axis=1, prepend=np.uint16(0)),
        "topk_logprob_codes": codes,
        "tail_logmass": np.log1p(-np.exp(0.3 * (1 - np.exp(codes / 12))).sum(axis=1)).astype(np.float32),
    }
    return Row(key, f"sample {key[:8]}", key + key, values)


def write_cache(url: str, shard_format: str, rows: int, shard_samples: int) -> CacheStore:
    generator = np.random.default_rng(0)
    keys = generator.integers(0, 256, (rows, 16), dtype=np.uint8)
    plan = Plan(keys, shard_samples, {})
    store = CacheStore.create_or_open(url, CacheSpec(FIELDS, FINGERPRINT), plan, shard_format=shard_format)
    for number in store.pending():
        store.commit_shard(number, [make_row(key, generator) for key in store.plan.keys_of(number)], [])
    return store


def batches(reader: CacheReader, epoch: int) -> Iterator[np.ndarray]:
    """Keys of a shuffled epoch, ``[<= BATCH, 16]``."""
    order = BatchOrder(reader.shards_of(reader.plan.keys), seed=0, window=WINDOW_SHARDS, batch_size=BATCH)
    return (reader.plan.keys[samples] for samples in order.epoch(epoch))


class Epoch(NamedTuple):
    """What one shuffled epoch took; processor time leaves out what other programs took of the core."""

    rows: int
    answers: int
    seconds: float
    cpu_seconds: float


def read(url: str, epoch: int) -> Epoch:
    """Every row once."""
    reader, fields = CacheReader(url, max_shards=WINDOW_SHARDS + 2), [field.name for field in FIELDS]
    planned = [(keys, reader.shards_of(keys).tolist()) for keys in batches(reader, epoch)]
    started, cpu_started, answers = time.perf_counter(), time.process_time(), 0
    for keys, shards in planned:
        reader.prefetch(shards)
        for key in keys:
            answers += reader.encoded_fields(key.tobytes().hex(), fields)["tail_logmass"].shape[0]
    return Epoch(len(reader), answers, time.perf_counter() - started, time.process_time() - cpu_started)


def raw_bytes(url: str) -> int:
    """Bytes of a row of the first shard before compression, on average."""
    shard = CacheReader(url).shard(0)
    parts = [part for i in range(len(shard)) for field in shard.encoded(i).values() for part in field.values()]
    return sum(part.nbytes for part in parts) // len(shard)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--shard-samples", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    urls = {shard_format: str(arguments.folder / shard_format) for shard_format in ("zarr", "webdataset")}
    statuses = {name: write_cache(url, name, arguments.rows, arguments.shard_samples).status() for name, url in urls.items()}
    # Taken in turns, so that what else the machine does falls on both.
    turns = [{name: read(url, epoch) for name, url in urls.items()} for epoch in range(arguments.repeats)]
    for name, status in statuses.items():
        epochs = [turn[name] for turn in turns]
        figures = {
            "format": name,
            "rows": status.samples_done,
            "raw_bytes_a_row": raw_bytes(urls[name]),
            "stored_bytes_a_row": status.total_bytes // status.samples_done,
            "rows_per_second": [round(epoch.rows / epoch.seconds) for epoch in epochs],
            "rows_per_cpu_second": [round(epoch.rows / epoch.cpu_seconds) for epoch in epochs],
            "answer_tokens_per_second": [round(epoch.answers / epoch.seconds) for epoch in epochs],
        }
        print(json.dumps(figures), flush=True)
    print(json.dumps({"load_average": os.getloadavg()}), flush=True)


if __name__ == "__main__":
    main()
