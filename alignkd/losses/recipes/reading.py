"""Recipes by name, from YAML files and with overrides of the command line. Imports no torch."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml

from alignkd.errors import ConfigError, wrap_errors
from alignkd.losses.layers import EXPECTED
from alignkd.losses.recipes.named import RECIPES
from alignkd.losses.recipes.recipe import Recipe
from alignkd.losses.term_registry import registered_terms
from alignkd.plain_files import read_plain
from alignkd.targets.logit_settings import DIVERGENCE_NAMES

_MAX_BYTES = 16 * 2**20


def get_recipe(name_or_file: str, overrides: Mapping[str, str] | None = None) -> Recipe:
    """A recipe by name or from a YAML file of its fields, with ``key=value`` overrides.

    A YAML file may start from another recipe: ``base: align-kd``. Keys are fields of a recipe, and names of registered terms
    (:mod:`alignkd.losses.custom_terms`), whose values are weights.

    Raises:
        ConfigError: an unknown recipe, key or value, or a file that is not readable.
    """
    recipe = _read(Path(name_or_file)) if Path(name_or_file).suffix in (".yaml", ".yml") else RECIPES.get(name_or_file)
    if recipe is None:
        raise ConfigError(f"recipe {name_or_file!r} is not known; known are {', '.join(RECIPES)}, or a FILE.yaml")
    values = {key: _parse(key, text) for key, text in (overrides or {}).items()}
    recipe = _replace(recipe, values, "--set")
    if recipe.token_weighting == "advantage" and not recipe.divergences:
        raise ConfigError(
            f"recipe {recipe.name}: token_weighting advantage weights the tokens of {', '.join(DIVERGENCE_NAMES)}, and all of"
            " them have weight 0: give one a weight, or use token_weighting uniform"
        )
    return recipe


def _read(path: Path) -> Recipe:
    with wrap_errors(ConfigError, f"recipe file {path} cannot be read", OSError, ValueError):
        content = read_plain(path, _MAX_BYTES)
    with wrap_errors(ConfigError, f"recipe file {path} is not YAML"):
        values = yaml.safe_load(content)
    if not isinstance(values, dict):
        raise ConfigError(f"recipe file {path} holds a {type(values).__name__}, expected fields of a recipe")
    base = values.pop("base", None)
    if base is not None and (not isinstance(base, str) or base not in RECIPES):
        raise ConfigError(f"recipe file {path}: base is {base!r}; known are {', '.join(RECIPES)}")
    values.setdefault("name", path.stem)
    return _replace(RECIPES[base] if base else Recipe(), values, str(path))


def _parse(key: str, text: str) -> Any:
    with wrap_errors(ConfigError, f"--set {key}={text}: not a value"):
        return yaml.safe_load(text)


def _replace(recipe: Recipe, values: Mapping[str, Any], where: str) -> Recipe:
    """The recipe with the values of some fields and of some registered terms."""
    types = {f.name: type(getattr(Recipe(), f.name)) for f in fields(Recipe) if f.name != "extra"}
    changed: dict[str, Any] = {}
    extra = dict(recipe.extra)
    for key, value in _flat(values, where).items():
        if key in types:
            changed[key] = _converted(key, value, types[key], where)
        elif key in registered_terms():
            extra[key] = _converted(key, value, float, where)
        else:
            raise ConfigError(
                f"{where}: {key!r} is no field of a recipe; known are {', '.join(types)}, and the registered"
                f" terms: {', '.join(registered_terms()) or 'none'}"
            )
    return replace(recipe, **changed, extra=extra)


def _flat(values: Mapping[str, Any], where: str) -> dict[Any, Any]:
    """The values with those under ``extra``, where a recorded recipe holds its extra terms, beside the others."""
    extra = values.get("extra", {})
    if not isinstance(extra, Mapping):
        raise ConfigError(f"{where}: extra is {extra!r}, expected weights of registered terms by name")
    return {**{key: value for key, value in values.items() if key != "extra"}, **extra}


def _converted(key: str, value: Any, kind: type, where: str) -> Any:
    if key == "attention_layers":
        value = _layers(value, where)
    if kind is float and isinstance(value, str):  # YAML reads 1e-2 as a string
        with suppress(ValueError):
            value = float(value)
    accepted = (int, float) if kind is float else (kind,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{where}: {key} is {value!r}, expected {kind.__name__}")
    try:
        return kind(value)
    except OverflowError as error:  # an integer beyond the range of a float
        raise ConfigError(f"{where}: {key} is out of range, expected {kind.__name__}") from error


def _layers(value: Any, where: str) -> str:
    """Layers as a file may give them, such as a list or a number, in the form of the field."""
    numbers = value if isinstance(value, list) else [value]
    if all(type(number) is int and number >= 0 for number in numbers) and numbers:
        return ",".join(map(str, numbers))
    if not isinstance(value, str):
        raise ConfigError(f"{where}: attention_layers is {value!r}, expected {EXPECTED}")
    return value.replace(" ", "")
