"""Rows as a teacher writes them, drawn at random: every field that docs/cache-format.md names, in any codec."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from cache_samples import key_of, keys_array

from alignkd.cache_store.protocol.plan import Plan
from alignkd.cache_store.protocol.store import CacheStore
from alignkd.cache_store.rows.row import Row
from alignkd.cache_store.rows.spec import CacheSpec, FieldSpec

HEADS, WIDTH, VOCABULARY, IMAGE, PER_IMAGE = 3, 8, 300, -200, 6
TOP_K, DRAWS, SKETCH = 5, 4, 7


def spec_of(kind: str = "sketch", attention: str = "sqrt8", vision: str = "int8-rows", heads: str = "per-head") -> CacheSpec:
    fields = [
        FieldSpec("input_ids", ("L",), "int32", "exact"),
        FieldSpec("labels", ("L",), "int32", "exact"),
        FieldSpec("spans", ("L", "E"), "int32", "exact"),
        FieldSpec("regions", ("R", "C"), "float32", "exact", per_image=True),
        FieldSpec("attention", ("H", "T", "V"), "float32", attention),
        FieldSpec("attention_3", ("H", "T", "V"), "float32", attention),
        FieldSpec("vision_tokens", ("V", "D"), "float32", vision, per_image=True),
    ]
    kept = [
        FieldSpec("topk_rank_steps", ("A", "K"), "uint16", "exact"),
        FieldSpec("topk_logprob_codes", ("A", "K"), "uint8", "exact"),
        FieldSpec("tail_logmass", ("A",), "float32", "float16"),
    ]
    more = {
        "topk": [*kept, FieldSpec("logsumexp", ("A",), "float32", "float16")],
        "sampled": [
            *kept,
            FieldSpec("draw_rank_steps", ("A", "J"), "uint16", "exact"),
            FieldSpec("draw_logprob_codes", ("A", "J"), "uint8", "exact"),
        ],
        "sketch": [*kept, FieldSpec("sketch", ("A", "S"), "uint8", "exact")],
        "hidden": [FieldSpec("hidden", ("A", "D"), "float32", "int8-rows")],
    }[kind]
    sizes = {"topk": {}, "sampled": {"draws": DRAWS}, "sketch": {"sketch_bytes": SKETCH}, "hidden": {"hidden_bits": 8}}[kind]
    logits = {"kind": kind, **({"top_k": TOP_K} if kind != "hidden" else {}), **sizes}
    fingerprint = {
        "teacher": {
            "heads": HEADS,
            "width": WIDTH,
            "vocabulary": VOCABULARY,
            "image_token_id": IMAGE,
            "tokens_per_placeholder": PER_IMAGE,
        },
        "targets": {"attention": heads, "vision": True, "logits": logits},
    }
    return CacheSpec((*fields, *more), fingerprint)


def teacher_row(spec: CacheSpec, i: int, rng: np.random.Generator, sharp: float = 1.0) -> Row:
    """A row with 0 to 2 images; ``sharp``: the larger, the more of all probability lies in few places."""
    length, images = int(rng.integers(1, 12)), int(rng.integers(0, 3))
    ids = rng.integers(0, VOCABULARY, length).astype(np.int32)
    ids[rng.permutation(length)[:images]] = IMAGE
    is_image = ids == IMAGE
    labels = np.where((rng.random(length) < 0.5) & ~is_image, ids, -100).astype(np.int32)
    images = int(is_image.sum())
    texts = length - int(is_image.argmax()) - images if images else 0
    columns, answers = images * PER_IMAGE, int((labels[1:] != -100).sum())
    heads = 1 if spec.fingerprint["targets"]["attention"] == "mean" else HEADS
    regions = [[n, 2, 2, 1, 0.0, 0.0, 1.0, 1.0] for n in range(images)]
    ends = np.sort(rng.integers(0, 50, (length, 2)), axis=1)
    values: dict[str, Any] = {
        "input_ids": ids,
        "labels": labels,
        "spans": ends.astype(np.int32),
        "regions": np.array(regions, np.float32).reshape(-1, 8),
        "vision_tokens": (rng.standard_normal((columns, WIDTH)) * 10.0 ** rng.integers(-6, 4)).astype(np.float32),
    }
    for name in ("attention", "attention_3"):
        values[name] = _shares(rng, (heads, texts, columns + 1), sharp)[..., :columns].astype(np.float32)
    values |= _answers(spec, answers, rng, sharp)
    image = f"{i:064x}" if images else ""
    return Row(key_of(i), f"sample-{i}", image, {field.name: values[field.name] for field in spec.fields})


def _shares(rng: np.random.Generator, shape: tuple[int, ...], sharp: float) -> np.ndarray:
    """Probabilities that sum to one along the last axis."""
    logits = rng.standard_normal(shape) * sharp
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True, initial=-np.inf))
    return odds / odds.sum(axis=-1, keepdims=True)


def _answers(spec: CacheSpec, answers: int, rng: np.random.Generator, sharp: float) -> dict[str, np.ndarray]:
    # Kept are the likeliest tokens of each answer, but for the label, which takes the place of the last of them.
    shares = _shares(rng, (answers, VOCABULARY), sharp)
    ranks = np.sort(shares.argsort(axis=1)[:, -TOP_K - 1 : -1] if sharp < 1 else shares.argsort(axis=1)[:, -TOP_K:], axis=1)
    kept = np.take_along_axis(shares, ranks, axis=1)
    rest = np.maximum(1 - kept.sum(axis=1), 0)
    drawn = np.sort(rng.integers(0, VOCABULARY, (answers, DRAWS)), axis=1)
    with np.errstate(divide="ignore"):
        tail = np.maximum(np.log(rest), -100)
    return {
        "topk_rank_steps": np.diff(ranks, axis=1, prepend=0).astype(np.uint16),
        "topk_logprob_codes": _codes(kept),
        "tail_logmass": tail.astype(np.float32),
        "logsumexp": rng.standard_normal(answers).astype(np.float32) * 20,
        "draw_rank_steps": np.diff(drawn, axis=1, prepend=0).astype(np.uint16),
        "draw_logprob_codes": _codes(np.take_along_axis(shares, drawn, axis=1)),
        "sketch": rng.integers(0, 256, (answers, SKETCH)).astype(np.uint8),
        "hidden": rng.standard_normal((answers, WIDTH)).astype(np.float32),
    }


def _codes(probabilities: np.ndarray) -> np.ndarray:
    """As the encoder writes log-probabilities: see docs/cache-format.md."""
    logs = np.maximum(np.log(np.maximum(probabilities, math.exp(-36))), -36)
    return np.rint(12 * np.log(1 - logs / 0.3)).astype(np.uint8)


def teacher_cache(
    url: str | Path, spec: CacheSpec, shard_format: str, *, rows: int = 20, seed: int = 0, sharp: float = 1.0
) -> CacheStore:
    """A cache of two shards."""
    rng = np.random.default_rng(seed)
    plan = Plan(keys_array(rows), -(-rows // 2), {})
    store = CacheStore.create_or_open(url, spec, plan, shard_format=shard_format)
    made = [teacher_row(spec, i, rng, sharp) for i in range(rows)]
    for number in store.pending():
        store.commit_shard(number, [made[i] for i in plan.positions_of(number)], [])
    return store
