"""Rank the samples of a cache, and write those that are kept.

1. Read the advantage of each row, if the cache has any, and let the student answer, if there is one.
2. Sort, largest first; of equal figures the key decides, so that the order is the same on every machine.
3. Keep the first, and write them.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.errors import CacheError, ConfigError
from alignkd.pipeline.config.cache_layout import ADVANTAGE
from alignkd.pipeline.config.rank import RankConfig
from alignkd.pipeline.data.contract import Samples
from alignkd.pipeline.data.open_samples import open_samples
from alignkd.pipeline.hub.models import pin_models
from alignkd.pipeline.rank.divergence import divergence_recipe, sample_divergences
from alignkd.pipeline.rank.kept import check_out_file, write_keys, write_ranking, write_samples
from alignkd.pipeline.runtime.progress import progress_bar
from alignkd.plugins import load_plugins

_SHOWN = 5
"""Samples of the ranking that the figures name."""

_log = logging.getLogger(__name__)


def rank(config: RankConfig) -> dict[str, Any]:
    """Figures of the ranking; writes the samples kept to ``config.out``.

    Raises:
        AlignkdError: nothing to rank by, a cache that cannot be read, or data that are not the cache's.
    """
    load_plugins(config.plugins)
    check_out_file(config)
    config = pin_models(config)
    if config.student is not None:
        divergence_recipe(config.recipe)
    reader = CacheReader(config.cache)
    has_advantage = any(field.name == ADVANTAGE for field in reader.spec.fields)
    _check_figures(config, has_advantage)
    samples = open_samples(config) if config.data else None
    keys = list(reader) if samples is None else _keys_of(samples, reader)
    figures: dict[str, dict[str, float]] = {}
    ids: dict[str, str] = {}
    if has_advantage:
        figures["advantage"] = _mean_advantages(reader, keys, ids)
    if config.student is not None:
        figures["divergence"] = sample_divergences(config)
    ranked_by = figures[config.ranked_by]
    ranked = sorted((key for key in keys if key in ranked_by), key=lambda key: (-ranked_by[key], key))
    if not ranked:
        raise CacheError(f"no sample of the cache {config.cache} can be ranked by {config.ranked_by}: none has an answer token")
    kept = ranked[: _count(config.top, len(ranked))]
    if config.out is not None:
        _write(config, samples, reader, kept, figures, ids)
    return {
        "cache": reader.url,
        "by": config.ranked_by,
        "samples": len(ranked),
        "without_figure": len(keys) - len(ranked),
        "kept": len(kept),
        **{f"{name}_{part}": value for name, by_key in figures.items() for part, value in _summary(by_key, ranked, kept)},
        "out": config.out,
        "first": [_line(reader, ids, key, figures) for key in kept[:_SHOWN]],
    }


def _check_figures(config: RankConfig, has_advantage: bool) -> None:
    if has_advantage or config.ranked_by == "divergence":
        return
    raise ConfigError(
        f"nothing to rank by: the cache {config.cache} holds no advantage, and --by divergence needs a student. Cache with"
        " advantage among --targets, or give --student, --data and --images"
    )


def _keys_of(samples: Samples, reader: CacheReader) -> list[str]:
    """The different keys of the data that have a row.

    Raises:
        CacheError: none has.
    """
    order = samples.unique()
    held = reader.shards_of(samples.keys[order]) >= 0
    keys = [key for key in (samples.key(int(i)) for i in order[held]) if key not in reader.rejected]
    if missing := len(order) - len(keys):
        _log.warning(
            "%s of %s samples of the data have no row in the cache and are left out", f"{missing:,}", f"{len(order):,}"
        )
    if not keys:
        raise CacheError(f"no sample of {samples.path} has a row in the cache {reader.url}: is it the data of this cache?")
    return keys


def _mean_advantages(reader: CacheReader, keys: Sequence[str], ids: dict[str, str]) -> dict[str, float]:
    """By key; the ids of the samples are added to ``ids``."""
    found = {}
    with progress_bar("read", len(keys), "rows") as progress:
        for row in reader.rows(keys, {ADVANTAGE}):
            ids[row.key] = row.sample_id
            if len(row.values[ADVANTAGE]):
                found[row.key] = float(row.values[ADVANTAGE].mean(dtype=np.float64))
            progress.advance(1)
    return found


def _count(top: int | str | None, samples: int) -> int:
    """How many samples are kept: of a share, rounded up, one at least."""
    if top is None:
        return samples
    return max(1, math.ceil(float(top[:-1]) / 100 * samples - 1e-9)) if isinstance(top, str) else top


def _summary(by_key: Mapping[str, float], ranked: Sequence[str], kept: Sequence[str]) -> list[tuple[str, float | None]]:
    def mean(keys: Sequence[str]) -> float | None:
        values = [by_key[key] for key in keys if key in by_key]
        return round(float(np.mean(values)), 6) if values else None

    return [("mean", mean(ranked)), ("mean_of_kept", mean(kept))]


def _line(reader: CacheReader, ids: Mapping[str, str], key: str, figures: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    sample_id = ids[key] if key in ids else reader.row(key, set()).sample_id
    return {"id": sample_id, "key": key} | {name: round(found[key], 6) for name, found in figures.items() if key in found}


def _write(
    config: RankConfig,
    samples: Samples | None,
    reader: CacheReader,
    kept: Sequence[str],
    figures: Mapping[str, Mapping[str, float]],
    ids: Mapping[str, str],
) -> None:
    assert config.out is not None
    path = Path(config.out)
    if path.suffix == ".txt":
        write_keys(path, kept)
    elif samples is not None:
        write_samples(path, samples, set(kept))
    else:
        write_ranking(path, (_line(reader, ids, key, figures) for key in kept))
