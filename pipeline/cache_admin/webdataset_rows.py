"""The rows of a cache's tar shards in anyone's pipeline: ``wds.WebDataset(shards).map(alignkd.decode_row)``."""

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from alignkd.cache_store.codecs import Array
from alignkd.cache_store.formats.webdataset_row import StreamedRow, read_alone
from alignkd.cache_store.formats.webdataset_shard import SUFFIX, TarShard
from alignkd.cache_store.limits import max_decoded_bytes
from alignkd.cache_store.protocol.manifest import read_manifest
from alignkd.cache_store.protocol.names import SHARDS
from alignkd.cache_store.protocol.tensors import Tensors
from alignkd.cache_store.rows.row import RowId
from alignkd.cache_store.storage import open_storage
from alignkd.errors import CacheError, wrap_errors
from alignkd.pipeline.cache_admin.row import ID_OF_RANK, named_arrays

_IMAGES_KEPT = 8
_kept = threading.local()


def decode_row(sample: Mapping[str, Any], cache: str | Path | None = None) -> dict[str, Any]:
    """The arrays of one row, from a sample of ``webdataset``: those of ``alignkd cache inspect --save``.

    A row with logits needs a tensor of its cache, which is looked for beside the folder that the shard is in. Where the
    shards lie elsewhere, or come through a pipe, give its URL: ``functools.partial(alignkd.decode_row, cache=URL)``. A row
    whose images an earlier row of the shard has takes their values from there; where that row did not come before (samples
    are shuffled), the shard is opened once more. Checksums of shards are not compared: ``alignkd cache verify`` does.

    Args:
        sample: ``__key__``, ``__url__``, ``json`` and ``blosc``, undecoded.
        cache: The folder or URL of the cache.

    Returns:
        ``__key__``, ``id`` and ``image_sha256``; ``input_ids [L]`` and ``labels [L]``; ``attention_HTV`` (of layer N:
        ``attention_N_HTV``), ``vision_tokens_VD``, ``topk_ids_AK``, ``topk_logprobs_AK``, ``tail_mass_A`` or ``hidden_AD``,
        as far as the cache holds them.

    Raises:
        CacheError: it is no row of a cache, it is damaged, or what it needs is not found.
    """
    key, url, frames = sample.get("__key__"), str(sample.get("__url__") or ""), sample.get("blosc")
    described = sample.get("json")
    if isinstance(described, dict):  # decoded by WebDataset.decode()
        described = json.dumps(described).encode()
    if not isinstance(key, str) or not isinstance(described, bytes) or not isinstance(frames, bytes):
        raise CacheError(
            f"sample {key!r} has {', '.join(sorted(map(str, sample)))}, expected the members json and blosc of a row: give the"
            f" shards of a cache in the format webdataset, CACHE/{SHARDS}/*{SUFFIX}"
        )
    streamed = StreamedRow(key, described, frames)
    if streamed.id.image_sha256 and not streamed.shared:
        _keep(url, streamed)
    row = streamed.row(lambda row_id, fields: _values_of_images(url, row_id, fields))
    kind = "hidden" if "hidden" in row.values else "topk" if "topk_rank_steps" in row.values else None
    with wrap_errors(CacheError, f"row {key} of {url} cannot be decoded", KeyError, IndexError, TypeError, ValueError):
        arrays = named_arrays(row.values, kind, lambda: _id_of_rank(_cache_of(url, key) if cache is None else str(cache)))
    return {"__key__": key, "id": row.sample_id, "image_sha256": row.image_sha256, **arrays}


def _keep(url: str, row: StreamedRow) -> None:
    """Remember the last few rows with images of this thread's stream: rows of one image follow each other in a shard."""
    if not hasattr(_kept, "rows"):
        _kept.rows = OrderedDict[tuple[str, str], StreamedRow]()
    _kept.rows.setdefault((url, row.id.image_sha256), row)
    if len(_kept.rows) > _IMAGES_KEPT:
        _kept.rows.popitem(last=False)


def _values_of_images(url: str, row: RowId, fields: frozenset[str]) -> Mapping[str, Array]:
    first: StreamedRow | None = getattr(_kept, "rows", {}).get((url, row.image_sha256))
    if first is not None and first.id.key != row.key:
        return first.values(fields)
    shard = _shard(url, row.key)
    if row.key not in shard.keys:
        raise CacheError(f"row {row.key} is not in {url}, from which it is said to come")
    return shard.row(shard.keys.index(row.key), fields).values


@lru_cache(maxsize=2)
def _id_of_rank(cache: str) -> np.ndarray:
    storage = open_storage(cache)
    return Tensors(storage, read_manifest(storage).tensors)[ID_OF_RANK]


def _shard(url: str, key: str) -> TarShard:
    folder, _, name = _path(url).rpartition("/")
    if not name.endswith(SUFFIX):
        raise CacheError(
            f"row {key} has its images' values in an earlier row of {url or 'its shard'}, which cannot be opened once more: map"
            " alignkd.decode_row before shuffling, or stream the shards from a path or URL"
        )
    return _opened_shard(folder or ".", name)


@lru_cache(maxsize=2)
def _opened_shard(folder: str, name: str) -> TarShard:
    try:
        return read_alone(open_storage(folder).read(name, max_decoded_bytes()))
    except FileNotFoundError as error:
        raise CacheError(f"{folder}/{name}: {error}") from error


def _cache_of(url: str, key: str) -> str:
    """The cache that a shard lies in: the folder around its folder."""
    folder, _, _ = _path(url).rpartition("/")
    cache, _, name = folder.rpartition("/")
    if name != SHARDS or url.startswith("pipe:"):
        raise CacheError(
            f"row {key} of {url or 'an unnamed shard'} has logits, whose token ids need the cache that it belongs to: stream"
            f" CACHE/{SHARDS}/*{SUFFIX}, or map functools.partial(alignkd.decode_row, cache=URL)"
        )
    return cache or ("/" if folder.startswith("/") else ".")


def _path(url: str) -> str:
    return url.removeprefix("file://") if url.startswith("file://") else url.removeprefix("file:")
