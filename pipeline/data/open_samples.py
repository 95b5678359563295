"""The one way in which jobs open data: :func:`open_samples`."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from alignkd.pipeline.config.shared import DataSettings, several
from alignkd.pipeline.data.contract import Samples, Source
from alignkd.pipeline.data.files.local_cache import SIZE_VARIABLE
from alignkd.pipeline.data.files.remote import local_form
from alignkd.pipeline.data.image_paths import check_image_folder
from alignkd.pipeline.data.mixture.mixed import MixedSamples, known_mixture
from alignkd.pipeline.data.mixture.mixture_file import is_mixture, read_mixture
from alignkd.pipeline.data.readers.registry import reader_of


def sources_of(config: DataSettings) -> tuple[Source, ...]:
    """The data that a configuration names, in their order. Where there are several, each has a name of its own.

    Raises:
        ConfigError: a mixture file that cannot be read, or says what it cannot.
    """
    data, images = several(config.data), several(config.images) or (None,)
    folders = images * len(data) if len(images) == 1 else images
    weights = config.data_weight or (1.0,) * len(data)
    found = list[Source]()
    for one, folder, weight in zip(data, folders, weights, strict=True):
        if is_mixture(one):
            found += read_mixture(one, folder, weight, merge_turns=config.merge_turns)
        else:
            name = PurePosixPath(one).name if len(data) > 1 else ""
            found.append(Source(one, folder, name=name, weight=weight, merge_turns=config.merge_turns))
    names = [source.name for source in found]
    return tuple(
        replace(
            source,
            data=local_form(source.data),
            images=None if source.images is None else local_form(source.images),
            name=source.data if names.count(source.name) > 1 else source.name,
        )
        for source in found
    )


def open_samples(config: DataSettings) -> Samples:
    """Index the data of a configuration: all of it, the first ``limit`` samples, or ``sample`` of them.

    Raises:
        ConfigError: a mixture file that cannot be read, or weights that leave no sample.
        DataError: data that cannot be read, or is not in a known format.
        TransientError: storage does not answer.
    """
    _use_local_cache(config)
    sources = sources_of(config)
    parts = [_first(reader_of(source).open_source(source), source.limit) for source in sources]
    samples = parts[0] if len(parts) == 1 and not sources[0].name else MixedSamples(sources, parts)
    samples = _first(samples, config.limit)
    return samples if config.sample is None else samples.select(chosen_by_key(samples, config.sample, config.sample_seed))


def _first(samples: Samples, limit: int | None) -> Samples:
    return samples if limit is None or limit >= len(samples) else samples.select(np.arange(limit))


def chosen_by_key(samples: Samples, count: int, seed: int = 0) -> np.ndarray:
    """The indices of ``count`` different samples, in the order of the data: those whose keys have the least second halves.

    A key is a hash of the content, so that this is a random choice, and the same in every shape and order of the data. With
    another seed than 0 the halves are hashed with it first.
    """
    different = samples.unique()
    halves = np.ascontiguousarray(samples.keys[different]).view(">u8").reshape(-1, 2).astype(np.uint64)
    ranks = halves[:, 1] if seed == 0 else _mixed(halves[:, 1], seed)
    return np.sort(different[np.lexsort((halves[:, 0], ranks))[:count]])


def _mixed(values_N: np.ndarray, seed: int) -> np.ndarray:
    """SplitMix64's output function (Steele, Lea and Flood 2014) of each value, moved by the seed."""
    mixed = values_N + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    found: np.ndarray = mixed ^ (mixed >> np.uint64(31))
    return found


def known_samples(config: DataSettings, keys: np.ndarray, locators: Mapping[str, np.ndarray]) -> Samples | None:
    """The samples of known keys ``[N, 16]`` in the places of :meth:`Samples.locators`; None where the readers are others."""
    _use_local_cache(config)
    sources = sources_of(config)

    def known(source: Source, keys: np.ndarray, locators: Mapping[str, np.ndarray]) -> Samples | None:
        return reader_of(source).known_source(source, keys, locators)

    if len(sources) == 1 and not sources[0].name:
        return known(sources[0], keys, locators)
    return known_mixture(sources, keys, locators, known)


def describe_data(config: DataSettings) -> dict[str, Any]:
    """What a plan keeps of the data that it was made from: names and sizes; other data, or another part of it, differ.

    Raises:
        DataError: the data is not there.
        TransientError: storage does not answer.
    """
    sources = sources_of(config)
    sizes = [reader_of(source).size(source) for source in sources]
    about: dict[str, Any] = {"data_file": ", ".join(PurePosixPath(source.data).name for source in sources)}
    about["bytes"] = sizes[0] if len(sizes) == 1 else sizes
    limits = [source.limit for source in sources]
    chosen: dict[str, Any] = {"limit": config.limit, "sample": config.sample, "sample_seed": config.sample_seed or None}
    chosen |= {"merge_turns": config.merge_turns or None, "limits": limits if any(limits) else None}
    return about | {name: value for name, value in chosen.items() if value is not None}


def check_images(config: DataSettings) -> None:
    """Refuse image folders that are not there, before a model is loaded and every sample is rejected for it.

    Raises:
        ConfigError: names the folder.
    """
    for folder in dict.fromkeys(source.images for source in sources_of(config)):
        check_image_folder(folder)


def _use_local_cache(config: DataSettings) -> None:
    """Say how large the local cache is, to this process and to those that it starts."""
    if config.local_cache is not None:
        os.environ[SIZE_VARIABLE] = config.local_cache
