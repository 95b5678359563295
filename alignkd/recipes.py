"""Named sets of terms and weights. Every number of the objective is a field here and nowhere else."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from alignkd.logits import DIVERGENCES

HeadMap = Literal["mixture", "convolution", "mean"]
WidthMap = Literal["lift", "isometry", "projection"]


@dataclass(frozen=True)
class Recipe:
    """Weights and settings of the objective; a weight of 0 leaves a term out (its target is then not needed).

    ``normalise``: measure attention against uniform attention and vision tokens against their variance, so that weights
    mean the same at any number of vision tokens and any width. ``vision_focus`` is the paper's lambda, ``focus_k`` its k.
    The gradient of the logit term carries no extra temperature factor: its weight says it all.
    """

    name: str = "custom"
    supervised: float = 1.0
    reverse_kl: float = 0.0
    forward_kl: float = 0.0
    jensen_shannon: float = 0.0
    attention: float = 0.0
    vision: float = 0.0
    vision_focus: float = 0.1
    focus_k: int = 16
    temperature: float = 1.0
    normalise: bool = True
    head_map: HeadMap = "mixture"
    width_map: WidthMap = "lift"

    def __post_init__(self) -> None:
        for name in ("supervised", *DIVERGENCES, "attention", "vision", "vision_focus"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"recipe {self.name}: {name} is {getattr(self, name)}, expected a weight of 0 or more")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"recipe {self.name}: temperature is {self.temperature}, expected more than 0")
        if self.focus_k < 1:
            raise ValueError(f"recipe {self.name}: focus_k is {self.focus_k}, expected 1 or more")
        for name, known in (("head_map", get_args(HeadMap)), ("width_map", get_args(WidthMap))):
            if getattr(self, name) not in known:
                raise ValueError(f"recipe {self.name}: {name} is {getattr(self, name)!r}; known are {', '.join(known)}")

    @property
    def divergences(self) -> tuple[str, ...]:
        """The logit terms that count."""
        return tuple(name for name in DIVERGENCES if getattr(self, name) > 0)

    @property
    def needs(self) -> frozenset[str]:
        """The targets the recipe cannot do without: of ``attention``, ``vision``, ``logits``."""
        wanted = {"attention": self.attention > 0, "vision": self.vision > 0, "logits": bool(self.divergences)}
        wanted["attention"] |= self.vision > 0 and self.vision_focus > 0
        return frozenset(name for name, is_wanted in wanted.items() if is_wanted)


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("align-kd", reverse_kl=1.0, attention=0.1, vision=1.0),
        Recipe("paper", reverse_kl=1.0, attention=1.0, vision=1.0, normalise=False, head_map="convolution"),
        Recipe("sft"),
        Recipe("logits-only", reverse_kl=1.0),
    )
}


def get_recipe(name_or_file: str, overrides: Mapping[str, str] | None = None) -> Recipe:
    """A recipe by name or from a YAML file of its fields, with ``key=value`` overrides.

    A YAML file may name a recipe to start from: ``base: align-kd``.

    Raises:
        ValueError: an unknown recipe, field or value.
    """
    recipe = _read(Path(name_or_file)) if Path(name_or_file).suffix in (".yaml", ".yml") else RECIPES.get(name_or_file)
    if recipe is None:
        raise ValueError(f"recipe {name_or_file!r} is not known; known are {', '.join(RECIPES)}, or a FILE.yaml")
    values = {key: _parse(key, text) for key, text in (overrides or {}).items()}
    return _replace(recipe, values, "--set")


_NEXT_TO_NOTHING = 2.0**-40


def one_term_recipes(recipe: Recipe) -> dict[str, Recipe]:
    """For each term that counts, by its name in the objective, a recipe of that term alone with the weight it has.

    ``vision_focus`` is a factor of ``vision``, which cannot be 0: there all vision tokens keep a weight of 1e-12.
    """
    weights = {name: getattr(recipe, name) for name in ("supervised", *DIVERGENCES, "attention", "vision")}
    nothing = dict.fromkeys(weights, 0.0)
    found = {name: {**nothing, name: weight} for name, weight in weights.items() if weight > 0}
    if vision := found.pop("vision", None):
        found["vision_all"] = {**vision, "vision_focus": 0.0}
        if recipe.vision_focus > 0:
            focus = recipe.vision * recipe.vision_focus / _NEXT_TO_NOTHING
            found["vision_focus"] = {**nothing, "vision": _NEXT_TO_NOTHING, "vision_focus": focus}
    return {term: replace(recipe, name=f"{recipe.name}: {term} alone", **values) for term, values in found.items()}


def _read(path: Path) -> Recipe:
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ValueError(f"recipe file {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"recipe file {path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"recipe file {path} holds a {type(values).__name__}, expected fields of a recipe")
    base = values.pop("base", None)
    if base is not None and (not isinstance(base, str) or base not in RECIPES):
        raise ValueError(f"recipe file {path}: base is {base!r}; known are {', '.join(RECIPES)}")
    values.setdefault("name", path.stem)
    return _replace(RECIPES[base] if base else Recipe(), values, str(path))


def _parse(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {key}={text}: not a value ({error.__class__.__name__})") from error


def _replace(recipe: Recipe, values: Mapping[str, Any], where: str) -> Recipe:
    types = {f.name: type(getattr(Recipe(), f.name)) for f in fields(Recipe)}
    converted: dict[str, Any] = {}
    for key, value in values.items():
        if key not in types:
            raise ValueError(f"{where}: {key!r} is no field of a recipe; known are {', '.join(types)}")
        kind = types[key]
        if kind is float and isinstance(value, str):  # YAML takes 1e-2 for a string
            with suppress(ValueError):
                value = float(value)
        accepted = (int, float) if kind is float else (kind,)
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{where}: {key} is {value!r}, expected {kind.__name__}")
        converted[key] = kind(value)
    return replace(recipe, **converted)


def describe(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data, for a run's resolved configuration."""
    return asdict(recipe)
