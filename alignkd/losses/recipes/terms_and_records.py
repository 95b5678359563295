"""What a recipe comes to: its terms by their names in the objective, each alone, and its record. Imports no torch."""

from dataclasses import asdict, replace
from typing import Any

from alignkd.losses.recipes.recipe import WEIGHTS, Recipe
from alignkd.targets.logit_settings import DIVERGENCE_NAMES

TERMS = ("supervised", *DIVERGENCE_NAMES, "attention", "vision_all", "vision_focus")
"""The terms of this package, by their names in the objective."""

_NEXT_TO_NOTHING = 2.0**-40


def term_weights(recipe: Recipe) -> dict[str, float]:
    """The factor of each unweighted term in the loss, by the term's name in the objective."""
    return {
        "supervised": recipe.supervised,
        **{name: getattr(recipe, name) for name in DIVERGENCE_NAMES},
        "attention": recipe.attention,
        "vision_all": recipe.vision,
        "vision_focus": recipe.vision * recipe.vision_focus,
        **recipe.extra,
    }


def one_term_recipes(recipe: Recipe) -> dict[str, Recipe]:
    """For each term whose weight is above 0, by its name in the objective, a recipe of that term alone with its weight.

    ``vision_focus`` is a factor of ``vision``, which cannot be 0: there all vision tokens keep a weight of 1e-12.
    """
    nothing: dict[str, Any] = {**dict.fromkeys(WEIGHTS, 0.0), "extra": {}}
    found = {name: {**nothing, name: getattr(recipe, name)} for name in WEIGHTS if getattr(recipe, name) > 0}
    if vision := found.pop("vision", None):
        found["vision_all"] = {**vision, "vision_focus": 0.0}
        if recipe.vision_focus > 0:
            focus = recipe.vision * recipe.vision_focus / _NEXT_TO_NOTHING
            found["vision_focus"] = {**nothing, "vision": _NEXT_TO_NOTHING, "vision_focus": focus}
    found |= {name: {**nothing, "extra": {name: recipe.extra[name]}} for name in recipe.extra_terms}
    return {term: replace(recipe, name=f"{recipe.name}: {term} alone", **values) for term, values in found.items()}


_NOT_IN_OLDER_RECORDS = ("projector", "extra")


def recipe_record(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data, for the record of a run.

    Fields that older records lack are there only where they are not the default: a run resumes under later versions.
    """
    default = Recipe()
    unchanged = {name for name in _NOT_IN_OLDER_RECORDS if getattr(recipe, name) == getattr(default, name)}
    return {name: value for name, value in asdict(recipe).items() if name not in unchanged}
