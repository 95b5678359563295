"""Before the teacher is loaded: does what will be cached serve the student and the recipe of stage two?"""

from collections.abc import Mapping
from typing import Any

from alignkd.errors import AlignkdError, ConfigError
from alignkd.losses.recipes import RECIPES, Recipe, get_recipe
from alignkd.models.loading import describe_vlm, load_vlm
from alignkd.models.vlm import Vlm
from alignkd.pipeline.cache_io.compatibility import check_attention_layers, check_recipe_targets, check_student_compatible
from alignkd.pipeline.cache_io.targets import row_fields
from alignkd.pipeline.cache_io.teacher_fingerprint import model_fingerprint
from alignkd.pipeline.config.cache_teacher import CacheTeacherConfig
from alignkd.pipeline.hub.models import model_folder, tower_folder
from alignkd.pipeline.stage_one.target_settings import resolve_targets, settings_of_rows

_DEFAULT_RECIPE = "align-kd"


def check_recipe(config: CacheTeacherConfig) -> Recipe | None:
    """Refuse targets that ``--recipe`` cannot train with; no model is needed. The recipe, None where none was given.

    Raises:
        ConfigError: names the targets that are lacking, or both temperatures, and the option to use.
    """
    if config.recipe is None:
        return RECIPES[_DEFAULT_RECIPE] if config.student is not None else None
    recipe, targets, logits = get_recipe(config.recipe), config.settings.targets, config.settings.logits
    if lacking := sorted(recipe.needs - set(targets)):
        wanted = ",".join(sorted(recipe.needs | set(targets)))
        raise ConfigError(
            f"recipe {recipe.name!r} needs {', '.join(lacking)}, which --targets {','.join(targets)} does not hold: use"
            f" --targets {wanted}"
        )
    cached = logits.fingerprint()["temperature"] if "logits" in recipe.needs else None
    if cached not in (None, recipe.temperature):
        raise ConfigError(
            f"recipe {recipe.name!r} has temperature {recipe.temperature}, but logits would be cached at --temperature"
            f" {cached}, and logits of kind {logits.kind!r} serve one temperature only: use --temperature {recipe.temperature}"
        )
    return recipe


def check_student(config: CacheTeacherConfig, recipe: Recipe | None, teacher: Vlm | None = None) -> bool:
    """Refuse a student that could not be trained from the cache to be; of both models only the small files are read.

    ``teacher``: the loaded teacher, where it could not be described without its weights before; False asks for that.

    Raises:
        ConfigError: names the student, what differs, and what to do.
        CheckpointError: one of the folders is no checkpoint.
    """
    if config.student is None or recipe is None:
        return True
    tower = tower_folder(config.vision_tower)
    teacher = teacher or describe_vlm(model_folder(config.teacher), vision_tower=tower)
    if teacher is None:
        return False
    folder = model_folder(config.student)
    student = describe_vlm(folder, vision_tower=tower) or load_vlm(folder, vision_tower=tower)
    settings = resolve_targets(config, teacher)
    rows = settings_of_rows(settings, config.alignment)
    fingerprint = _planned_fingerprint(config, teacher) | {"targets": settings.fingerprint()}
    known = fingerprint["teacher"]["family"] == student.family and fingerprint["template"] in student.templates
    template = fingerprint["template"] if known else student.default_template
    fields = [field.name for field in row_fields(rows, teacher.vocabulary)]
    try:
        check_recipe_targets(fingerprint, recipe)
        check_student_compatible(
            student, fingerprint, template, config.max_length, config.cache, needs=recipe.needs, fields=fields
        )
        if "attention" in recipe.needs:
            check_attention_layers(student, fingerprint, recipe)
    except AlignkdError as error:
        where = ". What --set changes in distill, a FILE.yaml given as --recipe changes here" if "--set " in str(error) else ""
        raise ConfigError(
            f"--student {config.student} could not be trained with recipe {recipe.name!r}: {error}{where}"
        ) from error
    return True


def _planned_fingerprint(config: CacheTeacherConfig, teacher: Vlm) -> dict[str, Any]:
    """The part of the fingerprint that students are compared with."""
    described: Mapping[str, Any] = model_fingerprint(teacher, config.template or teacher.default_template)
    limit = config.settings.logits.vocabulary
    first_ids = {} if limit is None else {"tokenizer_first_ids": teacher.tokenizer_fingerprint(limit)}
    return {**described, "max_length": config.max_length, "alignment": config.alignment, **first_ids}
