"""Which layers a recipe compares between a student and a teacher; :mod:`alignkd.losses.layers` says how they are named."""

from alignkd.errors import ConfigError
from alignkd.losses.layers import find_layers, matching_teacher_layer
from alignkd.losses.recipes import Recipe
from alignkd.models.vlm import Vlm


def compared_layers(recipe: Recipe, student: Vlm) -> tuple[int, ...]:
    """The student's layers whose attention a recipe compares; none where it compares no attention.

    Raises:
        ConfigError: the student has no such layer.
    """
    try:
        return find_layers(recipe.attention_layers, student.layers) if recipe.compares_attention else ()
    except ConfigError as error:
        raise ConfigError(f"recipe {recipe.name!r}, attention_layers of the student: {error}") from error


def find_layer_pairs(recipe: Recipe, student: Vlm, teacher_layers: int | None) -> tuple[tuple[int, int], ...]:
    """The :func:`compared_layers`, each with the teacher's layer that matches it.

    Raises:
        ConfigError: the student has no such layer, or layers beyond the first need ``teacher_layers``, which is None.
    """
    layers = compared_layers(recipe, student)
    if teacher_layers is None and any(layers):
        raise ConfigError(
            f"recipe {recipe.name!r} compares the student's layers {', '.join(map(str, layers))}: to match them, the number of"
            " the teacher's layers must be given"
        )
    return tuple((layer, matching_teacher_layer(layer, student.layers, teacher_layers or 1)) for layer in layers)


def needed_layers(recipe: Recipe, student: Vlm, teacher_layers: int | None) -> tuple[int, ...]:
    """The teacher's layers whose attention a recipe needs, in order: L_V-focus needs the first."""
    pairs = find_layer_pairs(recipe, student, teacher_layers)
    focus = {0} if recipe.vision > 0 and recipe.vision_focus > 0 else set()
    return tuple(sorted({teacher for _, teacher in pairs} | focus))
