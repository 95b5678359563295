"""Named sets of terms and weights. Imports no torch."""

from alignkd.losses.recipes.more_terms import MORE_TERMS
from alignkd.losses.recipes.named import RECIPES
from alignkd.losses.recipes.reading import get_recipe
from alignkd.losses.recipes.recipe import AttentionDistance, AttentionRows, HeadMap, Recipe, WidthMap
from alignkd.losses.recipes.terms_and_records import TERMS, one_term_recipes, recipe_record, term_weights

__all__ = [
    "MORE_TERMS",
    "RECIPES",
    "TERMS",
    "AttentionDistance",
    "AttentionRows",
    "HeadMap",
    "Recipe",
    "WidthMap",
    "get_recipe",
    "one_term_recipes",
    "recipe_record",
    "term_weights",
]
