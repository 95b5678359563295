"""Which layers a recipe compares between a student and a teacher; how they are named is in :mod:`alignkd.losses.layers`."""

from alignkd.losses.layers import find_layers, matching_teacher_layer
from alignkd.losses.recipes import Recipe
from alignkd.models.vlm import Vlm


def compared_layers(recipe: Recipe, student: Vlm) -> tuple[int, ...]:
    """The student's layers whose attention a recipe compares; none where it compares no attention.

    Raises:
        ValueError: the student has no such layer.
    """
    try:
        return find_layers(recipe.attention_layers, student.layers) if recipe.attention > 0 else ()
    except ValueError as error:
        raise ValueError(f"recipe {recipe.name!r}, attention_layers of the student: {error}") from error


def find_layer_pairs(recipe: Recipe, student: Vlm, teacher_layers: int | None) -> tuple[tuple[int, int], ...]:
    """The :func:`compared_layers`, each with the teacher's layer that it meets."""
    layers = compared_layers(recipe, student)
    assert teacher_layers is not None or not any(layers), "layers beyond the first need the number of the teacher's"
    return tuple((layer, matching_teacher_layer(layer, student.layers, teacher_layers or 1)) for layer in layers)


def needed_layers(recipe: Recipe, student: Vlm, teacher_layers: int | None) -> tuple[int, ...]:
    """The teacher's layers whose attention a recipe cannot do without, in order: L_V-focus wants the first."""
    pairs = find_layer_pairs(recipe, student, teacher_layers)
    focus = {0} if recipe.vision > 0 and recipe.vision_focus > 0 else set()
    return tuple(sorted({teacher for _, teacher in pairs} | focus))
