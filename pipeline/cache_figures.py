"""Progress and size of a cache in plain figures."""

from typing import Any

from alignkd.cache_store.store import CacheStore


def status_figures(store: CacheStore) -> dict[str, Any]:
    """Progress and size of a cache, as plain figures."""
    status = store.status()
    vocabulary = store.spec.fingerprint["teacher"]["vocabulary"]
    return {
        "cache": str(store.path),
        "complete": status.complete,
        "shards_done": status.shards_done,
        "shards": status.shards,
        "samples_done": status.samples_done,
        "samples_rejected": status.samples_rejected,
        "samples": status.samples,
        "bytes": status.total_bytes,
        "bytes_by_field": dict(status.bytes_by_field),
        "dense_bytes_by_field": dense_bytes(dict(status.decoded_bytes_by_field), int(vocabulary)),
        "seconds": round(status.seconds, 3),
        "samples_per_second": round(status.samples_done / status.seconds, 3) if status.seconds else 0.0,
        "tokens": status.tokens,
        "rejected": [{"id": r.sample_id, "key": r.key, "reason": r.reason} for r in status.rejected],
    }


def dense_bytes(decoded_bytes_by_field: dict[str, int], vocabulary: int) -> dict[str, int]:
    """What the same targets take uncompressed in 16 bits: attention and vision tokens as they are, logits in full."""
    dense: dict[str, int] = {
        name: decoded_bytes_by_field[name] // 2 for name in ("attention", "vision_tokens") if name in decoded_bytes_by_field
    }
    if "tail_logmass" in decoded_bytes_by_field:
        dense["logits"] = decoded_bytes_by_field["tail_logmass"] // 4 * vocabulary * 2
    return dense
