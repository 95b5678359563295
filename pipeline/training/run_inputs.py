"""Open what a run of stage two needs, and check the parts against each other: cache, student, prompts, data."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.cache_store.protocol.united import unite
from alignkd.capture.layer_pairs import needed_layers
from alignkd.errors import CacheError, ConfigError, wrap_errors
from alignkd.extras import require
from alignkd.inputs.prompts import check_template
from alignkd.models.loading import load_vlm
from alignkd.models.vlm import Vlm
from alignkd.pipeline.cache_io.compatibility import check_recipe_targets
from alignkd.pipeline.cache_io.open_caches import OpenCache, common_prompt_date, fit_cache, naming_cache
from alignkd.pipeline.cache_io.teacher_projector import see_through_teacher
from alignkd.pipeline.config.cache_layout import ADVANTAGE, SLICED, is_slice
from alignkd.pipeline.config.distill import DistillConfig
from alignkd.pipeline.config.shared import DEFAULT_MAX_LENGTH, several
from alignkd.pipeline.data.open_samples import check_images, open_samples
from alignkd.pipeline.data.preparer import Preparer
from alignkd.pipeline.feeding.dataset import TrainingSet
from alignkd.pipeline.feeding.order import WINDOW_SHARDS
from alignkd.pipeline.feeding.teacher_rows import TeacherRows, target_fields
from alignkd.pipeline.hub.models import model_folder, tower_folder
from alignkd.pipeline.runtime.devices import pick_device
from alignkd.pipeline.runtime.ranks import Worker
from alignkd.pipeline.training.training_arguments import check_trackers, zero_stage
from alignkd.pipeline.training.vision_input import takes_cached_tokens


@dataclass(frozen=True)
class RunInputs:
    """The opened inputs of a run. ``caches``: of one teacher each, in the order of the configuration; there may be none.

    ``needs``: the targets that come from them, none beside an online teacher. ``cached_tokens``: the student's vision tokens
    are made of those in the cache, so that images are not read.
    """

    config: DistillConfig
    device: str
    caches: tuple[OpenCache, ...]
    student: Vlm
    template: str
    max_length: int
    needs: frozenset[str]
    cached_tokens: bool = False


def check_options(config: DistillConfig) -> None:
    """Refuse options that contradict each other, and those whose packages are not installed.

    Raises:
        ConfigError: names them.
    """
    check_trackers(config.report_to)
    if config.lora:
        require("peft", "--lora")
    if config.deepspeed is not None:
        require("deepspeed", "--deepspeed")
    if config.deepspeed is not None and config.optimizer != "adamw":
        raise ConfigError(f"--optimizer {config.optimizer} does not run under --deepspeed; use adamw")
    if config.term_gradients and zero_stage(config.deepspeed) == 3:
        raise ConfigError("--term-gradients needs every parameter on every process, which ZeRO-3 does not keep; use zero2")
    if config.online_teacher is not None and len(several(config.cache)) > 1:
        raise ConfigError(
            "--online-teacher with several --cache: a teacher in the loop is one teacher, and a cache beside it decides the"
            " samples and their order alone; give one --cache, or leave --online-teacher out"
        )
    if config.online_teacher is not None and config.recipe.projector == "teacher":
        raise ConfigError("projector teacher takes the teacher's projector from the cache: leave --online-teacher out")
    if config.teacher_dtype is not None and config.online_teacher is None:
        raise ConfigError("--teacher-dtype sets the dtype of --online-teacher, which is not given")


def open_inputs(config: DistillConfig, process: Worker) -> RunInputs:
    """Open cache and student; check prompts, targets and layers. The cheap checks come before the student is loaded.

    Raises:
        AlignkdError: an input that cannot be read, or two that do not belong together.
    """
    needs = config.recipe.needs if config.online_teacher is None else frozenset[str]()
    opened = _open_readers(config, needs)
    readers = [reader for reader, _ in opened]
    cached_tokens = takes_cached_tokens(config, readers)
    if cached_tokens:
        needs |= {"vision"}
    else:
        check_images(config)
    device = pick_device(config.device, process.local_rank)
    student = load_vlm(model_folder(config.student), device=device, vision_tower=tower_folder(config.vision_tower))
    if config.recipe.projector == "teacher":
        see_through_teacher(student, readers, seed=config.seed)
    template, max_length = _prompt_settings(config, student, readers)
    check_template(template, student.templates)
    caches = []
    for reader, weight in opened:
        with naming_cache(reader, len(readers)):
            caches.append(fit_cache(reader, student, config.recipe, needs, template, max_length, weight))
    return RunInputs(config, device, tuple(caches), student, template, max_length, needs, cached_tokens)


def _open_readers(config: DistillConfig, needs: frozenset[str]) -> list[tuple[CacheReader, float]]:
    """The caches and their weights; those of one teacher as one cache."""
    urls = several(config.cache)
    if needs and not urls:
        raise ConfigError(
            f"recipe {config.recipe.name!r} needs {', '.join(sorted(needs))} from a teacher: give --cache (or --online-teacher)"
        )
    readers = []
    for url in urls:
        readers.append(CacheReader(url, max_shards=2 * WINDOW_SHARDS))  # of this window of samples, and of the next
        if config.online_teacher is None:
            with naming_cache(readers[-1], len(urls)):
                check_recipe_targets(readers[-1].fingerprint, config.recipe)
    return unite(readers, config.cache_weight or (1.0,) * len(readers), max_shards=2 * WINDOW_SHARDS)


def _prompt_settings(config: DistillConfig, student: Vlm, readers: Sequence[CacheReader]) -> tuple[str, int]:
    """Template and maximum length: those given, else the cache's, else the student's own and the default.

    A cache's template serves if its teacher is of the student's model family; other families have prompts of their own. Of
    several caches the first decides whose template serves, or the first.
    """
    found = []
    for reader in readers:
        unreadable = f"the fingerprint of the cache at {reader.url} is damaged: write the cache again"
        with wrap_errors(CacheError, unreadable, KeyError, TypeError, ValueError, AttributeError):
            cached = reader.fingerprint
            same_family = cached["teacher"].get("family", student.family) == student.family
            serves = same_family and str(cached["template"]) in student.templates
            found.append((serves, str(cached["template"]) if serves else student.default_template, int(cached["max_length"])))
    first = next((one for one in found if one[0]), found[0] if found else (False, student.default_template, DEFAULT_MAX_LENGTH))
    return config.template or first[1], config.max_length or first[2]


def _prompt_date(inputs: RunInputs) -> str | None:
    """The date that prompts show where the template writes one: the cache's or, without one, that of the run which goes on."""
    if (date := common_prompt_date(inputs.caches)) is not None:
        return date
    record = Path(inputs.config.out) / "run.json"
    if not inputs.config.resume or not record.is_file():
        return None
    try:
        found = json.loads(record.read_text())["configuration"]["prompt_date"]
    except (ValueError, KeyError, TypeError):  # of another version; or damaged, which is said when it is compared
        return None
    return found if isinstance(found, str) else None


def open_data(inputs: RunInputs) -> TrainingSet:
    """Index the data file; with a cache, every sample must have its row.

    Raises:
        AlignkdError: a data file that cannot be read, or whose samples are not those of the cache.
    """
    config = inputs.config
    samples = open_samples(config)
    preparer = Preparer.of(
        inputs.student,
        template=inputs.template,
        max_length=inputs.max_length,
        with_spans=any(cache.cross_model is not None for cache in inputs.caches),
        prompt_date=_prompt_date(inputs),
        with_destroyed=config.online_teacher is not None and ADVANTAGE in config.recipe.needs,
        reads_images=not inputs.cached_tokens,
    )
    first = inputs.caches[0] if inputs.caches else None
    return TrainingSet(
        samples,
        preparer,
        student=inputs.student,
        reader=first.reader if first else None,
        needs=_needs(inputs, first) if first else frozenset(),
        max_rejected=config.max_rejected,
        cross_model=first.cross_model if first else None,
        attention_layers=_layers(inputs, first) if first else (),
        others=[_rows(inputs, cache) for cache in inputs.caches[1:]],
        weight=first.weight if first else 1.0,
    )


def _needs(inputs: RunInputs, cache: OpenCache) -> frozenset[str]:
    """The targets that come from the rows of a cache: a slice of the teacher makes some of them."""
    return inputs.needs - SLICED if is_slice(cache.reader.fingerprint) else inputs.needs


def _layers(inputs: RunInputs, cache: OpenCache) -> tuple[int, ...]:
    if "attention" not in _needs(inputs, cache):
        return ()
    return needed_layers(inputs.config.recipe, inputs.student, cache.teacher_layers)


def _rows(inputs: RunInputs, cache: OpenCache) -> TeacherRows:
    fields = target_fields(cache.reader, inputs.student, _needs(inputs, cache), _layers(inputs, cache))
    return TeacherRows(cache.reader, tuple(fields), cache.cross_model, cache.weight)
