"""Open the held-out samples of a run: their rows, if a cache holds them, and what they share with the training samples."""

import logging
from dataclasses import replace

import numpy as np

from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.errors import CacheError, ConfigError
from alignkd.losses.recipes import RECIPES
from alignkd.objective import Objective
from alignkd.pipeline.cache_io.compatibility import check_attention_layers, check_recipe_targets, check_student_compatible
from alignkd.pipeline.config.distill import DistillConfig
from alignkd.pipeline.config.shared import several
from alignkd.pipeline.data.open_samples import open_samples
from alignkd.pipeline.feeding.dataset import TrainingSet
from alignkd.pipeline.feeding.order import WINDOW_SHARDS
from alignkd.pipeline.training.evaluation.held_out import HeldOut
from alignkd.pipeline.training.run_inputs import RunInputs, open_data
from alignkd.pipeline.training.teacher_source import Teacher, open_teacher
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
    teacher: Teacher | None = None
    if config.online_teacher is not None:
        data, recipe = open_data(replace(inputs, config=own)), config.recipe
        agreement = _names_likeliest(objective.logit_codec)
    else:
        reader = _reader(inputs)
        found = _with_reader(replace(inputs, config=own), reader, inputs.reader)
        data, same = open_data(found), reader is None or config.eval_cache is None
        teacher = None if same else open_teacher(found)
        recipe = config.recipe if reader is not None else RECIPES["sft"]
        codec = objective.logit_codec if same else teacher.logit_codec if teacher else None
        agreement = reader is not None and "logits" in found.needs and _names_likeliest(codec)
    if data.preparer.encoder.prompt_date:
        data.preparer.encoder.prompt_date = training.preparer.encoder.prompt_date
    _warn_of_shared(data, training)
    return HeldOut(data, recipe, teacher, agreement, batch_size)


def held_out_config(config: DistillConfig) -> DistillConfig:
    """The configuration of a run with its held-out samples in place of those that it learns from: all of them, once each."""
    assert config.eval_data is not None
    images = config.eval_images or config.images
    if config.eval_images is None and len(several(images)) > 1:
        raise ConfigError("--images is given several times: give --eval-images, the folder of the held-out samples' images")
    return replace(config, data=config.eval_data, images=images, data_weight=(), limit=None, sample=None, resume=False)


def _names_likeliest(codec: LogitCodec | None) -> bool:
    """Whether targets say which token is the teacher's likeliest: of one kept token that may be the label instead."""
    if codec is not None and codec.kind != "hidden" and codec.settings.top_k < 2:
        _log.warning("the cache keeps one token an answer, the label: agreement with the teacher is not measured")
        return False
    return codec is not None


def _reader(inputs: RunInputs) -> CacheReader | None:
    """The cache that holds the held-out samples: the one given, the run's own if all are in it, or none."""
    config = inputs.config
    assert config.eval_data is not None
    if config.eval_cache is not None:
        return CacheReader(config.eval_cache, max_shards=2 * WINDOW_SHARDS)
    if inputs.reader is None:
        return None
    samples = open_samples(held_out_config(config))
    missing = int((inputs.reader.shards_of(samples.keys) < 0).sum())
    if missing > samples.faults:
        _log.info(
            "held-out samples: %s of %s have no row in %s, so their supervised loss alone is measured; for the teacher's"
            " terms, cache them and give --eval-cache",
            f"{missing:,}",
            f"{len(samples):,}",
            config.cache,
        )
        return None
    return CacheReader(inputs.reader.url, max_shards=2 * WINDOW_SHARDS)


def _with_reader(inputs: RunInputs, reader: CacheReader | None, of_training: CacheReader | None) -> RunInputs:
    """The inputs with another cache, compared with the student and with the run's own cache.

    Raises:
        CacheError: names what differs.
    """
    if reader is None:
        return replace(inputs, reader=None, needs=frozenset(), cross_model=None, teacher_layers=None)
    found, recipe = reader.fingerprint, inputs.config.recipe
    if of_training is not None and of_training.url != reader.url:
        _check_same_teacher(found, of_training, reader.url)
    check_recipe_targets(found, recipe)
    needs = recipe.needs | ({"logits"} if "logits" in found["targets"] and found["targets"]["logits"] else frozenset())
    fields = [field.name for field in reader.spec.fields]
    cross_model = check_student_compatible(
        inputs.student, found, inputs.template, inputs.max_length, reader.url, needs=needs, fields=fields
    )
    layers = check_attention_layers(inputs.student, found, recipe) if "attention" in needs else None
    return replace(inputs, reader=reader, needs=frozenset(needs), cross_model=cross_model, teacher_layers=layers)


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
