"""Open the held-out samples of a run: their rows, if a cache holds them, and what they share with the training samples."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest

import numpy as np

from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.cache_store.protocol.united import unite
from alignkd.capture.teacher import Teacher
from alignkd.errors import CacheError, ConfigError
from alignkd.losses.recipes import RECIPES
from alignkd.objective import Objective
from alignkd.pipeline.cache_io.compatibility import check_recipe_targets
from alignkd.pipeline.cache_io.open_caches import OpenCache, fit_cache, naming_cache
from alignkd.pipeline.config.shared import several
from alignkd.pipeline.data.open_samples import open_samples
from alignkd.pipeline.feeding.dataset import TrainingSet
from alignkd.pipeline.feeding.order import WINDOW_SHARDS
from alignkd.pipeline.training.evaluation.held_out import HeldOut
from alignkd.pipeline.training.evaluation.held_out_config import held_out_config
from alignkd.pipeline.training.run_inputs import RunInputs, open_data
from alignkd.pipeline.training.teacher_source import open_teachers
from alignkd.targets.logits import LogitCodec

_BATCH = 16
_NAMED = 3
_log = logging.getLogger(__name__)


def open_held_out(inputs: RunInputs, training: TrainingSet, objective: Objective) -> HeldOut | None:
    """The held-out samples of a configuration; None without ``eval_data``. Those that are trained on, too, are warned of.

    Raises:
        AlignkdError: a file or a cache that cannot be read, or a cache that does not belong to the run's.
    """
    config = inputs.config
    if config.eval_data is None:
        return None
    own = held_out_config(config)
    batch_size = config.samples_at_once or max(1, min(_BATCH, (config.batch_tokens or 0) // inputs.max_length))
    teachers: tuple[Teacher, ...] | None = None
    if config.online_teacher is not None:
        data, recipe = open_data(replace(inputs, config=own)), config.recipe
        agreement = _name_likeliest([objective.logit_codec])
    else:
        readers = _readers(inputs)
        found = _with_readers(replace(inputs, config=own), readers, inputs.caches)
        data, same = open_data(found), not readers or config.eval_cache is None
        teachers = None if same else open_teachers(found)
        recipe = config.recipe if readers else RECIPES["sft"]
        codecs = [teacher.logit_codec for teacher in (objective.teachers if teachers is None else teachers)]
        agreement = bool(readers) and "logits" in found.needs and _name_likeliest(codecs)
    if data.preparer.encoder.prompt_date:
        data.preparer.encoder.prompt_date = training.preparer.encoder.prompt_date
    _warn_of_shared(data, training)
    return HeldOut(data, recipe, teachers, agreement, batch_size)


def _name_likeliest(codecs: Sequence[LogitCodec | None]) -> bool:
    """Whether targets say which token is each teacher's likeliest: of one kept token that may be the label instead."""
    if any(codec is not None and codec.kind != "hidden" and codec.settings.top_k < 2 for codec in codecs):
        _log.warning("the cache keeps one token an answer, the label: agreement with the teacher is not measured")
        return False
    return all(codec is not None for codec in codecs)


def _readers(inputs: RunInputs) -> list[CacheReader]:
    """The caches that hold the held-out samples: those given, the run's own if all samples are in them, or none."""
    config = inputs.config
    assert config.eval_data is not None
    if config.eval_cache is not None:
        given = [CacheReader(url, max_shards=2 * WINDOW_SHARDS) for url in several(config.eval_cache)]
        found = [reader for reader, _ in unite(given, [1.0] * len(given), max_shards=2 * WINDOW_SHARDS)]
        if inputs.caches and len(found) != len(inputs.caches):
            raise ConfigError(
                f"--eval-cache has targets of {len(found)} teachers and --cache of {len(inputs.caches)}: give the held-out"
                " cache of each teacher, in the order of --cache, or none where the training caches hold the held-out samples"
            )
        return found
    if not inputs.caches:
        return []
    samples = open_samples(held_out_config(config))
    missing = int(np.all([cache.reader.shards_of(samples.keys) < 0 for cache in inputs.caches], axis=0).sum())
    if missing > samples.faults:
        _log.info(
            "held-out samples: %s of %s have no row in %s, so their supervised loss alone is measured; for the teacher's"
            " terms, cache them and give --eval-cache",
            f"{missing:,}",
            f"{len(samples):,}",
            ", ".join(several(config.cache)),
        )
        return []
    return [cache.reader.again(max_shards=2 * WINDOW_SHARDS) for cache in inputs.caches]


def _with_readers(inputs: RunInputs, readers: Sequence[CacheReader], of_training: Sequence[OpenCache]) -> RunInputs:
    """The inputs with other caches, each compared with the student and with the run's own cache of its teacher.

    Raises:
        CacheError: names what differs.
    """
    if not readers:
        assert not inputs.cached_tokens, "a held-out cache was asked for"
        return replace(inputs, caches=(), needs=frozenset())
    recipe, caches = inputs.config.recipe, list[OpenCache]()
    have_logits = all(reader.fingerprint["targets"].get("logits") for reader in readers)
    needs = frozenset(recipe.needs | ({"logits"} if have_logits else set()) | ({"vision"} if inputs.cached_tokens else set()))
    for reader, before in zip_longest(readers, of_training[: len(readers)]):
        if before is not None and before.reader.url != reader.url:
            _check_same_teacher(reader.fingerprint, before.reader, reader.url)
        with naming_cache(reader, len(readers)):
            check_recipe_targets(reader.fingerprint, recipe)
            weight = before.weight if before is not None else 1.0
            caches.append(fit_cache(reader, inputs.student, recipe, needs, inputs.template, inputs.max_length, weight))
    return replace(inputs, caches=tuple(caches), needs=needs)


def _check_same_teacher(found: object, training: CacheReader, url: str) -> None:
    assert isinstance(found, dict)
    before = training.fingerprint
    differing = [name for name in ("teacher", "template", "max_length", "alignment") if found.get(name) != before.get(name)]
    if found.get("targets", {}).get("attention") != before.get("targets", {}).get("attention"):
        differing.append("targets.attention")
    if differing:
        raise CacheError(
            f"--eval-cache {url} differs from the run's cache {training.url} in {', '.join(differing)}: its targets cannot be"
            " compared with those of training. Write it with the same teacher and options, on the held-out data"
        )


def _warn_of_shared(data: TrainingSet, training: TrainingSet) -> None:
    kinds = [one.samples.keys[one.indices].view("V16")[:, 0] for one in (data, training)]
    shared = np.flatnonzero(np.isin(*kinds)).tolist()
    if shared:
        named = ", ".join(data.sample(place).id or data.samples.key(place) for place in shared[:_NAMED])
        _log.warning(
            "%s of %s held-out samples are training samples, too (%s%s): their figures say nothing about others",
            f"{len(shared):,}",
            f"{len(data):,}",
            named,
            ", ..." if len(shared) > _NAMED else "",
        )
