"""Progress and size of a cache, as figures."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from alignkd.cache_store.protocol import manifest
from alignkd.cache_store.protocol.record import CommitRecord
from alignkd.cache_store.protocol.status import Status
from alignkd.cache_store.protocol.store import CacheStore, open_store
from alignkd.cache_store.protocol.worker_reports import AT_WORK, Heard, read_reports
from alignkd.cache_store.rows.reasons import count_reasons, reason_class
from alignkd.cache_store.storage import open_storage
from alignkd.pipeline.cache_admin.sight import SIGHT, recorded_sight
from alignkd.pipeline.cache_admin.workers import worker_figures
from alignkd.pipeline.config.cache_layout import attention_layer, logit_width
from alignkd.pipeline.config.fingerprint_keys import check_fingerprint_keys

RECENT_S = 600.0
"""The recent rate covers this many seconds before the last commit."""


def figures_at(url: str) -> dict[str, Any]:
    """:func:`status_figures` of the cache at ``url``, and its workers; before it exists, those about to start it.

    Raises:
        CacheError: there is neither a cache nor a worker, or the cache is damaged.
        ConfigError: a URL that cannot be opened.
    """
    storage, now = open_storage(url), time.time()
    heard = read_reports(storage)
    if storage.size(manifest.NAME) is None and heard:
        return {"cache": storage.url, "complete": False, **_workers([], heard, now)}
    store = open_store(url)
    records = list(store.status().records.values())
    return status_figures(store) | _workers(records, read_reports(storage), now)


def _workers(records: Sequence[CommitRecord], heard: Sequence[Heard], now: float) -> dict[str, Any]:
    workers = worker_figures(records, heard, now=now, recent_s=RECENT_S)
    return {"workers": workers, "workers_at_work": sum(worker["state"] in AT_WORK for worker in workers)}


def status_figures(store: CacheStore) -> dict[str, Any]:
    """Progress and size of a cache, which workers may still be writing.

    Raises:
        CacheError: its fingerprint does not describe its targets.
    """
    status, fingerprint = store.status(), store.spec.fingerprint
    check_fingerprint_keys(fingerprint, "teacher", "targets", cache=store.url)
    retrying = sorted(store.retrying())
    dense = dense_bytes(status.decoded_bytes_by_field, logit_width(fingerprint), fingerprint["teacher"]["width"])
    return {
        "cache": store.url,
        "format": store.manifest.shard_format,
        "complete": status.complete and not retrying,
        "shards_done": status.shards_done,
        "shards": status.shards,
        "shards_missing": list(status.missing),
        "shards_to_retry": retrying,
        "samples_done": status.samples_done,
        "samples_rejected": len(status.rejected),
        "samples": status.samples,
        "plans": len(store.plan.parts),
        "bytes": status.total_bytes,
        "bytes_by_field": status.bytes_by_field,
        "tensor_bytes": status.tensor_bytes,
        "dense_bytes_by_field": dense,
        **per_sample(status, dense),
        "seconds": round(status.seconds, 3),
        "samples_per_second": round(status.samples_done / status.seconds, 3) if status.seconds else 0.0,
        "tokens": status.tokens,
        **recent_figures(status),
        SIGHT: recorded_sight(store.storage),
        "rejected_by_reason": rejected_by_reason(status),
        "rejected": rejected_samples(status),
    }


def rejected_by_reason(status: Status) -> dict[str, int]:
    """How many samples were rejected for each kind of reason, most frequent first."""
    return count_reasons(sample.reason for sample in status.rejected)


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
    return [{"id": r.sample_id, "key": r.key, "kind": reason_class(r.reason), "reason": r.reason} for r in status.rejected]


def dense_bytes(decoded_bytes_by_field: Mapping[str, int], vocabulary: int, width: int) -> dict[str, int]:
    """Bytes of the same targets uncompressed in 16 bits: all of attention and vision tokens, and logits over all ids.

    ``vocabulary``: ids that logits are over. ``width``: of the teacher's hidden states.
    """
    dense = dict[str, int]()
    for name, size in decoded_bytes_by_field.items():
        if attention_layer(name) is not None or name == "vision_tokens":
            target = "vision_tokens" if name == "vision_tokens" else "attention"
            dense[target] = dense.get(target, 0) + size // 2
    answers = decoded_bytes_by_field.get("tail_logmass", 0) // 4 or decoded_bytes_by_field.get("hidden", 0) // (4 * width)
    if answers:
        dense["logits"] = answers * vocabulary * 2
    return dense
