"""Open what a run of stage two needs, and check the parts against each other: cache, student, prompts, data."""

import json
from dataclasses import dataclass
from pathlib import Path

from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.capture.layer_pairs import needed_layers
from alignkd.errors import CacheError, ConfigError, wrap_errors
from alignkd.extras import require
from alignkd.inputs.prompts import check_template
from alignkd.models.loading import load_vlm
from alignkd.models.vlm import Vlm
from alignkd.pipeline.cache_io.compatibility import check_attention_layers, check_recipe_targets, check_student_compatible
from alignkd.pipeline.cache_io.cross_model import CrossModelMap
from alignkd.pipeline.config.cache_layout import ADVANTAGE, SLICED, is_slice
from alignkd.pipeline.config.distill import DistillConfig
from alignkd.pipeline.config.shared import DEFAULT_MAX_LENGTH
from alignkd.pipeline.data.open_samples import check_images, open_samples
from alignkd.pipeline.data.preparer import Preparer
from alignkd.pipeline.feeding.dataset import TrainingSet
from alignkd.pipeline.feeding.order import WINDOW_SHARDS
from alignkd.pipeline.hub.models import model_folder, tower_folder
from alignkd.pipeline.runtime.devices import pick_device
from alignkd.pipeline.runtime.ranks import Worker
from alignkd.pipeline.training.training_arguments import check_trackers, zero_stage


@dataclass(frozen=True)
class RunInputs:
    """The opened inputs of a run. ``cross_model``: how rows become this student's targets, None where they are used unchanged.

    ``needs``: the targets that come from the cache, none of them beside an online teacher. ``teacher_layers``: how many
    layers the cache's teacher has, None where the recipe compares no attention from the cache.
    """

    config: DistillConfig
    device: str
    reader: CacheReader | None
    student: Vlm
    template: str
    max_length: int
    needs: frozenset[str]
    cross_model: CrossModelMap | None
    teacher_layers: int | None


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
    if config.teacher_dtype is not None and config.online_teacher is None:
        raise ConfigError("--teacher-dtype sets the dtype of --online-teacher, which is not given")


def open_inputs(config: DistillConfig, process: Worker) -> RunInputs:
    """Open cache and student; check prompts, targets and layers. The cheap checks come before the student is loaded.

    Raises:
        AlignkdError: an input that cannot be read, or two that do not belong together.
    """
    check_images(config)
    needs = config.recipe.needs if config.online_teacher is None else frozenset[str]()
    reader = _open_cache(config, needs)
    device = pick_device(config.device, process.local_rank)
    student = load_vlm(model_folder(config.student), device=device, vision_tower=tower_folder(config.vision_tower))
    template, max_length = _prompt_settings(config, student, reader)
    check_template(template, student.templates)
    cross_model, teacher_layers = None, None
    if reader is not None:
        fields = [field.name for field in reader.spec.fields]
        found = reader.fingerprint
        cross_model = check_student_compatible(student, found, template, max_length, reader.url, needs=needs, fields=fields)
        if "attention" in needs:
            teacher_layers = check_attention_layers(student, found, config.recipe)
    return RunInputs(config, device, reader, student, template, max_length, needs, cross_model, teacher_layers)


def _open_cache(config: DistillConfig, needs: frozenset[str]) -> CacheReader | None:
    if config.cache is None:
        if needs:
            raise ConfigError(
                f"recipe {config.recipe.name!r} needs {', '.join(sorted(needs))} from a teacher: give --cache (or"
                " --online-teacher)"
            )
        return None
    reader = CacheReader(config.cache, max_shards=2 * WINDOW_SHARDS)  # of this window of samples, and of the next
    if config.online_teacher is None:
        check_recipe_targets(reader.fingerprint, config.recipe)
    return reader


def _prompt_settings(config: DistillConfig, student: Vlm, reader: CacheReader | None) -> tuple[str, int]:
    """Template and maximum length: those given, else the cache's, else the student's own and the default.

    The cache's template serves if its teacher is of the student's model family; other families have prompts of their own.
    """
    template, max_length = student.default_template, DEFAULT_MAX_LENGTH
    if reader is not None:
        unreadable = f"the fingerprint of the cache at {reader.url} is damaged: write the cache again"
        with wrap_errors(CacheError, unreadable, KeyError, TypeError, ValueError, AttributeError):
            found = reader.fingerprint
            max_length = int(found["max_length"])
            same_family = found["teacher"].get("family", student.family) == student.family
            if same_family and str(found["template"]) in student.templates:
                template = str(found["template"])
    return config.template or template, config.max_length or max_length


def _prompt_date(inputs: RunInputs) -> str | None:
    """The date that prompts show where the template writes one: the cache's or, without one, that of the run which goes on."""
    if inputs.reader is not None and "prompt_date" in inputs.reader.fingerprint:
        return str(inputs.reader.fingerprint["prompt_date"])
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
    config, needs = inputs.config, inputs.needs
    if inputs.reader is not None and is_slice(inputs.reader.fingerprint):
        needs -= SLICED
    samples = open_samples(config)
    preparer = Preparer.of(
        inputs.student,
        template=inputs.template,
        max_length=inputs.max_length,
        with_spans=inputs.cross_model is not None,
        prompt_date=_prompt_date(inputs),
        with_destroyed=config.online_teacher is not None and ADVANTAGE in config.recipe.needs,
    )
    layers = needed_layers(config.recipe, inputs.student, inputs.teacher_layers) if "attention" in needs else ()
    return TrainingSet(
        samples,
        preparer,
        student=inputs.student,
        reader=inputs.reader,
        needs=needs,
        max_rejected=config.max_rejected,
        cross_model=inputs.cross_model,
        attention_layers=layers,
    )
