"""A small cache to test with: ragged rows like those of a teacher, some without text or image, some of one image."""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from alignkd.cache_store.protocol.plan import Plan
from alignkd.cache_store.protocol.record import CommitRecord
from alignkd.cache_store.protocol.store import CacheStore
from alignkd.cache_store.protocol.tensors import TensorSource
from alignkd.cache_store.rows.row import Rejected, Row
from alignkd.cache_store.rows.spec import CacheSpec, FieldSpec
from alignkd.cache_store.storage import Storage, open_storage
from alignkd.cache_store.storage.local import LocalStorage

SPEC = CacheSpec(
    fields=(
        FieldSpec("attention", ("H", "T", "V"), "float32", "int8-rows"),
        FieldSpec("vision", ("V", "D"), "float32", "float16", per_image=True),
        FieldSpec("token_ids", ("T",), "int32", "exact"),
        FieldSpec("mass", (), "float32", "exact"),
    ),
    fingerprint={"teacher": {"weights": "a" * 64, "template": "v1"}, "top_k": 8},
)

TENSORS = {"head": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4), "slice.weight": np.arange(5, dtype=np.uint16)}

# What both formats have in common is tested with this one.
FASTER = "webdataset"


def key_of(i: int) -> str:
    return hashlib.sha256(str(i).encode()).hexdigest()[:32]


def keys_array(count: int) -> np.ndarray:
    return np.frombuffer(bytes.fromhex("".join(map(key_of, range(count)))), np.uint8).reshape(count, 16)


def make_row(i: int) -> Row:
    """Samples 1 and 2, 4 and 5, 7 and 8 have an image in common; 0, 3, 6 and 9 have none."""
    rng = np.random.default_rng(i)
    tokens, vision, image = int(rng.integers(0, 6)), 0 if i % 3 == 0 else 5, i // 3
    values = {
        "attention": rng.random((2, tokens, vision), dtype=np.float32),
        "vision": np.random.default_rng(1000 + image).standard_normal((vision, 4), dtype=np.float32),
        "token_ids": rng.integers(0, 32000, tokens, dtype=np.int32),
        "mass": np.array(rng.random(), dtype=np.float32),
    }
    return Row(key_of(i), f"sample-{i}/é", f"{image:064x}" if vision else "", values)


def make_rows(count: int, first: int = 0) -> list[Row]:
    return [make_row(i) for i in range(first, first + count)]


def plan_of(samples: int = 10, shard_samples: int = 4, order: slice = slice(None), seed: int = 1) -> Plan:
    return Plan(keys_array(samples)[order], shard_samples, {"seed": seed}, {"place": np.arange(samples)[order]})


def make_store(
    url: str | Path,
    samples: int = 10,
    shard_samples: int = 4,
    spec: CacheSpec = SPEC,
    shard_format: str = FASTER,
    tensors: TensorSource = dict,
) -> CacheStore:
    return CacheStore.create_or_open(url, spec, plan_of(samples, shard_samples), shard_format=shard_format, tensors=tensors)


def fill(store: CacheStore, *, reject: tuple[int, ...] = ()) -> CacheStore:
    """Commit all pending shards; samples in ``reject`` are rejected."""
    for number in store.pending():
        commit(store, number, reject=reject)
    return store


def commit(store: CacheStore, number: int, *, reject: tuple[int, ...] = (), worker: str = "") -> CommitRecord:
    samples = store.plan.extras["place"][store.plan.positions_of(number)]
    rows = [make_row(int(i)) for i in samples if i not in reject]
    rejected = [Rejected(key_of(int(i)), f"sample-{i}/é", "too long") for i in samples if i in reject]
    return store.commit_shard(number, rows, rejected, seconds=1.5, tokens=100, worker=worker)


def full_cache(url: str | Path, shard_samples: int = 4, shard_format: str = FASTER) -> Storage:
    """Ten samples, the fifth rejected, two tensors and the record of one run; copied from one that was written before."""
    storage = open_storage(url)
    for name, data in _written_before(shard_samples, shard_format).items():
        if isinstance(storage, LocalStorage):
            (storage.root / name).parent.mkdir(parents=True, exist_ok=True)
            (storage.root / name).write_bytes(data)
        else:
            storage.write(name, data)
    return storage


@functools.cache
def _written_before(shard_samples: int, shard_format: str) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(folder, shard_samples=shard_samples, shard_format=shard_format, tensors=TENSORS)
        fill(store, reject=(4,))
        store.write_run({"seed": 1, "versions": {"alignkd": "0"}})
        return contents(store.storage)


def all_names(storage: Storage) -> list[str]:
    """Every object of a cache, temporaries too."""
    folders = ("", "plan", "tensors", "runs", "shards", "commits")
    names = [f"{folder}/{name}".lstrip("/") for folder in folders for name in storage.names(folder)]
    return [name for name in names if storage.size(name) is not None]


def contents(storage: Storage) -> dict[str, bytes]:
    return {name: storage.read(name) for name in all_names(storage)}


def overwrite(storage: Storage, name: str, data: bytes) -> None:
    storage.delete(name)
    assert storage.write(name, data)


def flip(storage: Storage, name: str, where: float = 0.5, bit: int = 0) -> None:
    """Change one bit of an object."""
    data = bytearray(storage.read(name))
    data[int(where * (len(data) - 1))] ^= 1 << bit
    overwrite(storage, name, bytes(data))


def in_process(method: str, function: Callable[..., Any], *args: Any) -> Any:
    """The result of ``function`` in another process."""
    context = multiprocessing.get_context(method)
    results = context.SimpleQueue()
    process = context.Process(target=_put, args=(results, function, args))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    return results.get()


def _put(results: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    results.put(function(*args))
