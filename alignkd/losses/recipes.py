"""Named sets of terms and weights. Every number of the objective is a field here and nowhere else."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from alignkd.losses.layers import EXPECTED, check_layers
from alignkd.targets.logit_settings import DIVERGENCE_NAMES

HeadMap = Literal["mixture", "convolution", "mean"]
WidthMap = Literal["lift", "isometry", "projection"]
AttentionDistance = Literal["mse", "kl", "cosine"]
AttentionRows = Literal["text", "answer", "instruction"]
Weighting = Literal["fixed", "learned"]
_CHOICES = {
    "head_map": HeadMap,
    "width_map": WidthMap,
    "attention_distance": AttentionDistance,
    "attention_rows": AttentionRows,
    "weighting": Weighting,
}


@dataclass(frozen=True)
class Recipe:
    """Weights and settings of the objective; a weight of 0 leaves a term out (its target is then not needed).

    ``normalise``: measure attention against uniform attention and vision tokens against their variance, so that weights
    mean the same at any number of vision tokens and any width. ``vision_focus`` is the paper's lambda, ``focus_k`` its k.
    The gradient of the logit term carries no extra temperature factor: its weight says it all.

    ``attention_distance`` and ``attention_rows``: see :mod:`alignkd.losses.attention_distance`. ``attention_layers``: the
    student's,
    see :mod:`alignkd.losses.layers`; the term is the mean over them. ``weighting``: see :mod:`alignkd.losses.learned_weights`,
    whose
    weights have a learning rate of their own, as a model's would hardly move them.
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
    attention_distance: AttentionDistance = "mse"
    attention_rows: AttentionRows = "text"
    attention_layers: str = "first"
    weighting: Weighting = "fixed"
    weighting_learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("supervised", *DIVERGENCE_NAMES, "attention", "vision", "vision_focus"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"recipe {self.name}: {name} is {getattr(self, name)}, expected a weight of 0 or more")
        for name in ("temperature", "weighting_learning_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"recipe {self.name}: {name} is {getattr(self, name)}, expected more than 0")
        if self.focus_k < 1:
            raise ValueError(f"recipe {self.name}: focus_k is {self.focus_k}, expected 1 or more")
        for name, choice in _CHOICES.items():
            if getattr(self, name) not in get_args(choice):
                known = ", ".join(get_args(choice))
                raise ValueError(f"recipe {self.name}: {name} is {getattr(self, name)!r}; known are {known}")
        try:
            check_layers(self.attention_layers)
        except ValueError as error:
            raise ValueError(f"recipe {self.name}: attention_layers: {error}") from error
        if self.attention_distance == "kl" and self.head_map == "convolution":
            raise ValueError(
                f"recipe {self.name}: attention_distance kl compares distributions, which head_map convolution does not give;"
                " use head_map mixture or mean"
            )

    @property
    def divergences(self) -> tuple[str, ...]:
        """The logit terms that count."""
        return tuple(name for name in DIVERGENCE_NAMES if getattr(self, name) > 0)

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
        Recipe("llavadi-forward", forward_kl=1.0),
        Recipe("llavadi-reverse", reverse_kl=1.0),
        Recipe("llavadi-js", jensen_shannon=1.0),
        Recipe(
            "compodistill",
            forward_kl=1.0,
            attention=1.0,
            attention_distance="cosine",
            attention_layers="middle",
            head_map="mean",
        ),
        Recipe("beta-kd", reverse_kl=1.0, attention=0.1, vision=1.0, weighting="learned"),
    )
}

ABOUT = {
    "align-kd": "Align-KD (arXiv 2412.01282), terms normalised so that weights mean the same at any size",
    "paper": "Align-KD as its paper states the terms, with the head map of its released code, which is trained here",
    "sft": "no teacher",
    "logits-only": "reverse KL alone",
    "llavadi-forward": "the logit distillation of LLaVADI (arXiv 2407.19409), forward KL on answer tokens; its distilled"
    " features, affinities and generated data are not here",
    "llavadi-reverse": "the same with reverse KL",
    "llavadi-js": "the same with the Jensen-Shannon divergence, the middle of its generalised ones",
    "compodistill": "after CompoDistill (arXiv 2510.12184): cosine of head-mean attention in the middle layers, forward KL;"
    " rows are text and not vision tokens, each compared by itself; layers meet one to one and not in groups; high"
    " attention is not filtered; no three stages, and the teacher's projector is not taken over",
    "beta-kd": "align-kd with a learned precision for each term, after Beta-KD (arXiv 2603.21426), its form of one precision"
    " a term; it cites Kendall et al. (arXiv 1705.07115) for it",
}
"""What each recipe is, whose it is after, and what differs."""


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
    weights = {name: getattr(recipe, name) for name in ("supervised", *DIVERGENCE_NAMES, "attention", "vision")}
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
        if key == "attention_layers":
            value = _layers(value, where)
        if kind is float and isinstance(value, str):  # YAML takes 1e-2 for a string
            with suppress(ValueError):
                value = float(value)
        accepted = (int, float) if kind is float else (kind,)
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{where}: {key} is {value!r}, expected {kind.__name__}")
        converted[key] = kind(value)
    return replace(recipe, **converted)


def _layers(value: Any, where: str) -> str:
    """Layers as a file may give them, a list or a number among others, in the form that the field has."""
    numbers = value if isinstance(value, list) else [value]
    if all(type(number) is int and number >= 0 for number in numbers) and numbers:
        return ",".join(map(str, numbers))
    if not isinstance(value, str):
        raise ValueError(f"{where}: attention_layers is {value!r}, expected {EXPECTED}")
    return value.replace(" ", "")


def describe(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data, for a run's resolved configuration."""
    return asdict(recipe)


TERMS = ("supervised", *DIVERGENCE_NAMES, "attention", "vision_all", "vision_focus")


def term_weights(recipe: Recipe) -> dict[str, float]:
    """The factor of each unweighted term in the loss."""
    return {
        "supervised": recipe.supervised,
        **{name: getattr(recipe, name) for name in DIVERGENCE_NAMES},
        "attention": recipe.attention,
        "vision_all": recipe.vision,
        "vision_focus": recipe.vision * recipe.vision_focus,
    }
