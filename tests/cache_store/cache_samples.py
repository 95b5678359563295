"""A small cache to test with: ragged rows like those of a teacher, text-only and empty ones among them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from alignkd.cache_store.row import Rejected, Row
from alignkd.cache_store.spec import CacheSpec, FieldSpec
from alignkd.cache_store.store import CacheStore

SPEC = CacheSpec(
    fields=(
        FieldSpec("attention", ("H", "T", "V"), "float32", "int8-rows"),
        FieldSpec("vision", ("V", "D"), "float32", "float16"),
        FieldSpec("token_ids", ("T",), "int32", "exact"),
        FieldSpec("mass", (), "float32", "exact"),
    ),
    fingerprint={"teacher": {"weights": "a" * 64, "template": "v1"}, "top_k": 8},
)


def key_of(i: int) -> str:
    return hashlib.sha256(str(i).encode()).hexdigest()[:32]


def keys_array(count: int) -> np.ndarray:
    return np.frombuffer(bytes.fromhex("".join(map(key_of, range(count)))), np.uint8).reshape(count, 16)


def make_row(i: int) -> Row:
    rng = np.random.default_rng(i)
    tokens, vision = int(rng.integers(0, 6)), 0 if i % 3 == 0 else 5
    values = {
        "attention": rng.random((2, tokens, vision), dtype=np.float32),
        "vision": rng.standard_normal((vision, 4), dtype=np.float32),
        "token_ids": rng.integers(0, 32000, tokens, dtype=np.int32),
        "mass": np.array(rng.random(), dtype=np.float32),
    }
    return Row(key_of(i), f"sample-{i}/é", "b" * 64 if vision else "", values)


def make_rows(count: int, first: int = 0) -> list[Row]:
    return [make_row(i) for i in range(first, first + count)]


def make_store(path: Path, samples: int = 10, shard_samples: int = 4, spec: CacheSpec = SPEC) -> CacheStore:
    keys, meta = keys_array(samples), {"seed": 1}
    return CacheStore.create_or_open(path, spec, keys, shard_samples=shard_samples, plan_meta=meta)


def fill(store: CacheStore, *, reject: tuple[int, ...] = ()) -> CacheStore:
    """Commit all pending shards; samples in ``reject`` are rejected."""
    for number in store.pending():
        first = number * store.plan.shard_samples
        samples = range(first, first + len(store.plan.keys_of(number)))
        rows = [make_row(i) for i in samples if i not in reject]
        rejected = [Rejected(key_of(i), f"sample-{i}/é", "too long") for i in samples if i in reject]
        store.commit_shard(number, rows, rejected, seconds=1.5, tokens=100)
    return store


def flip(path: Path, at: int) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def shard_files(path: Path) -> list[Path]:
    return sorted((path / "shards").iterdir())
