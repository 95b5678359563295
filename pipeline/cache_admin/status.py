"""Progress and size of a cache, as figures."""

from typing import Any

from alignkd.cache_store.protocol.status import Status
from alignkd.cache_store.protocol.store import CacheStore
from alignkd.pipeline.config.cache_layout import logit_width
from alignkd.pipeline.config.fingerprint_keys import check_fingerprint_keys

RECENT_S = 600.0
"""The recent rate covers this many seconds before the last commit."""


def status_figures(store: CacheStore) -> dict[str, Any]:
    """Progress and size of a cache, which workers may still be writing.

    Raises:
        CacheError: its fingerprint does not describe its targets.
    """
    status, fingerprint = store.status(), store.spec.fingerprint
    check_fingerprint_keys(fingerprint, "teacher", "targets", cache=store.url)
    dense = dense_bytes(status.decoded_bytes_by_field, logit_width(fingerprint), fingerprint["teacher"]["width"])
    return {
        "cache": store.url,
        "format": store.manifest.shard_format,
        "complete": status.complete,
        "shards_done": status.shards_done,
        "shards": status.shards,
        "samples_done": status.samples_done,
        "samples_rejected": len(status.rejected),
        "samples": status.samples,
        "bytes": status.total_bytes,
        "bytes_by_field": status.bytes_by_field,
        "tensor_bytes": status.tensor_bytes,
        "dense_bytes_by_field": dense,
        **per_sample(status, dense),
        "seconds": round(status.seconds, 3),
        "samples_per_second": round(status.samples_done / status.seconds, 3) if status.seconds else 0.0,
        "tokens": status.tokens,
        **recent_figures(status),
        "rejected": rejected_samples(status),
    }


def per_sample(status: Status, dense: dict[str, int]) -> dict[str, dict[str, int]]:
    """Stored bytes a sample by field, and the bytes of the same targets uncompressed in 16 bits."""
    done = max(status.samples_done, 1)
    return {
        "bytes_per_sample_by_field": {name: round(size / done) for name, size in status.bytes_by_field.items()},
        "dense_bytes_per_sample_by_field": {name: round(size / done) for name, size in dense.items()},
    }


def recent_figures(status: Status) -> dict[str, Any]:
    """The recent rate of all workers together, and the time left at that rate."""
    finished = sorted(((record.finished, record) for record in status.records.values()), key=lambda pair: pair[0])
    if len(finished) < 2:
        return {"recent_workers": len(finished), "recent_samples_per_second": None, "seconds_left": None}
    last = finished[-1][0]
    recent = [record for when, record in finished if when >= last - RECENT_S]
    # The first of them was made before the window began: only the samples finished after it count.
    samples = sum(record.rows for record in recent[1:])
    span = last - recent[0].finished
    rate = samples / span if span > 0 else None
    left = status.samples - status.samples_done - len(status.rejected)
    return {
        "recent_workers": len({record.worker for record in recent}),
        "recent_samples_per_second": None if rate is None else round(rate, 3),
        "seconds_left": None if not rate else round(left / rate, 1),
    }


def rejected_samples(status: Status) -> list[dict[str, str]]:
    """Every rejected sample with its reason."""
    return [{"id": r.sample_id, "key": r.key, "reason": r.reason} for r in status.rejected]


def dense_bytes(decoded_bytes_by_field: dict[str, int], vocabulary: int, width: int) -> dict[str, int]:
    """Bytes of the same targets uncompressed in 16 bits: all of attention and vision tokens, and logits over all ids.

    ``vocabulary``: ids that logits are over. ``width``: of the teacher's hidden states.
    """
    dense: dict[str, int] = {
        name: decoded_bytes_by_field[name] // 2 for name in ("attention", "vision_tokens") if name in decoded_bytes_by_field
    }
    answers = decoded_bytes_by_field.get("tail_logmass", 0) // 4 or decoded_bytes_by_field.get("hidden", 0) // (4 * width)
    if answers:
        dense["logits"] = answers * vocabulary * 2
    return dense
