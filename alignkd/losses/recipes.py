"""Named sets of terms and weights. Every number of the objective is a field here and nowhere else. Imports no torch."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from alignkd.errors import ConfigError, wrap_errors
from alignkd.losses.layers import EXPECTED, check_layers
from alignkd.losses.term_registry import find_term, registered_terms
from alignkd.plain_files import read_plain
from alignkd.targets.logit_settings import DIVERGENCE_NAMES

HeadMap = Literal["mixture", "convolution", "mean"]
WidthMap = Literal["lift", "isometry", "projection"]
AttentionDistance = Literal["mse", "kl", "cosine"]
AttentionRows = Literal["text", "answer", "instruction"]
Weighting = Literal["fixed", "learned"]
TokenWeighting = Literal["uniform", "advantage"]
_CHOICES = {
    "head_map": HeadMap,
    "width_map": WidthMap,
    "attention_distance": AttentionDistance,
    "attention_rows": AttentionRows,
    "weighting": Weighting,
    "token_weighting": TokenWeighting,
}

_MAX_BYTES = 16 * 2**20
_WEIGHTS = ("supervised", *DIVERGENCE_NAMES, "attention", "vision")


@dataclass(frozen=True)
class Recipe:
    """Weights and settings of the objective. A term of weight 0 is left out, and its target is not needed.

    ``normalise``: measure attention relative to uniform attention and vision tokens relative to their variance, so that weights
    mean the same at any number of vision tokens and any width. ``vision_focus`` is the paper's lambda, ``focus_k`` its k.
    The gradient of a logit term has no extra factor of the temperature: its weight is all.

    ``attention_distance`` and ``attention_rows``: see :mod:`alignkd.losses.attention_distance`. ``attention_layers``: the
    student's, see :mod:`alignkd.losses.layers`; the term is the mean over them. ``weighting``: see
    :mod:`alignkd.losses.learned_weights`; learned weights have a learning rate of their own, since that of a model would hardly
    change them. ``token_weighting``: how answer tokens count in the terms that compare answer distributions, with
    ``token_top_share`` and ``token_lambda``, see :mod:`alignkd.losses.token_weights`. ``extra``: weights of terms from outside
    the package (:mod:`alignkd.losses.custom_terms`), by name.

    Raises:
        ConfigError: a value out of range, a choice that is not known, an extra term that is not registered, or a contradiction.
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
    token_weighting: TokenWeighting = "uniform"
    token_top_share: float = 0.2
    token_lambda: float = 0.5
    extra: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        # In the order of names: the loss is a sum, whose last bits depend on the order.
        object.__setattr__(self, "extra", {name: float(self.extra[name]) for name in sorted(self.extra)})
        for name in self.extra:
            with _of_recipe(self, "extra"):
                find_term(name)
        for name, weight in {**self.weights, "vision_focus": self.vision_focus}.items():
            if not 0 <= weight < float("inf"):
                raise ConfigError(f"recipe {self.name}: {name} is {weight}, expected a weight of 0 or more")
        for name in ("temperature", "weighting_learning_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"recipe {self.name}: {name} is {getattr(self, name)}, expected more than 0")
        if not 0 < self.token_top_share < 1:
            raise ConfigError(
                f"recipe {self.name}: token_top_share is {self.token_top_share}, expected a share above 0 and below 1"
            )
        if not 0 <= self.token_lambda <= 1:
            raise ConfigError(f"recipe {self.name}: token_lambda is {self.token_lambda}, expected 0 to 1")
        if self.focus_k < 1:
            raise ConfigError(f"recipe {self.name}: focus_k is {self.focus_k}, expected 1 or more")
        for name, choice in _CHOICES.items():
            if getattr(self, name) not in get_args(choice):
                known = ", ".join(get_args(choice))
                raise ConfigError(f"recipe {self.name}: {name} is {getattr(self, name)!r}; known are {known}")
        with _of_recipe(self, "attention_layers"):
            check_layers(self.attention_layers)
        if self.attention_distance == "kl" and self.head_map == "convolution":
            raise ConfigError(
                f"recipe {self.name}: attention_distance kl compares distributions, which head_map convolution does not give;"
                " use head_map mixture or mean"
            )

    @property
    def weights(self) -> dict[str, float]:
        """The weights by name, those of extra terms included; not ``vision_focus``, which is a factor of ``vision``."""
        return {name: getattr(self, name) for name in _WEIGHTS} | dict(self.extra)

    @property
    def divergences(self) -> tuple[str, ...]:
        """The logit terms whose weight is above 0."""
        return tuple(name for name in DIVERGENCE_NAMES if getattr(self, name) > 0)

    @property
    def extra_terms(self) -> tuple[str, ...]:
        """The terms from outside the package whose weight is above 0."""
        return tuple(name for name, weight in self.extra.items() if weight > 0)

    @property
    def compares_attention(self) -> bool:
        """Whether a term compares the student's attention with the teacher's."""
        return self.attention > 0 or any("attention" in find_term(name).needs for name in self.extra_terms)

    @property
    def needs(self) -> frozenset[str]:
        """The targets that the recipe needs: of ``attention``, ``vision``, ``logits``, ``advantage``."""
        wanted = {"attention": self.attention > 0, "vision": self.vision > 0, "logits": bool(self.divergences)}
        wanted["advantage"] = self.token_weighting == "advantage" and bool(self.divergences)
        wanted["attention"] |= self.vision > 0 and self.vision_focus > 0
        built_in = {name for name, is_wanted in wanted.items() if is_wanted}
        return frozenset(built_in.union(*(find_term(name).needs for name in self.extra_terms)))


@contextmanager
def _of_recipe(recipe: Recipe, field_name: str) -> Iterator[None]:
    """Errors say which field of which recipe they are about."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"recipe {recipe.name}: {field_name}: {error}") from error


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
        Recipe("visual-advantage", reverse_kl=1.0, token_weighting="advantage"),
        Recipe("beta-kd", reverse_kl=1.0, attention=0.1, vision=1.0, weighting="learned"),
    )
}


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


_NEXT_TO_NOTHING = 2.0**-40


def one_term_recipes(recipe: Recipe) -> dict[str, Recipe]:
    """For each term whose weight is above 0, by its name in the objective, a recipe of that term alone with its weight.

    ``vision_focus`` is a factor of ``vision``, which cannot be 0: there all vision tokens keep a weight of 1e-12.
    """
    nothing: dict[str, Any] = {**dict.fromkeys(_WEIGHTS, 0.0), "extra": {}}
    found = {name: {**nothing, name: getattr(recipe, name)} for name in _WEIGHTS if getattr(recipe, name) > 0}
    if vision := found.pop("vision", None):
        found["vision_all"] = {**vision, "vision_focus": 0.0}
        if recipe.vision_focus > 0:
            focus = recipe.vision * recipe.vision_focus / _NEXT_TO_NOTHING
            found["vision_focus"] = {**nothing, "vision": _NEXT_TO_NOTHING, "vision_focus": focus}
    found |= {name: {**nothing, "extra": {name: recipe.extra[name]}} for name in recipe.extra_terms}
    return {term: replace(recipe, name=f"{recipe.name}: {term} alone", **values) for term, values in found.items()}


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
                f"{where}: {key!r} is no field of a recipe; known are {', '.join(types)}, and the terms registered from outside"
                f" the package: {', '.join(registered_terms()) or 'none'}"
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


def recipe_record(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data, for the record of a run; ``extra`` only where it has extra terms, as in older records."""
    record = asdict(recipe)
    if not recipe.extra:
        del record["extra"]
    return record


TERMS = ("supervised", *DIVERGENCE_NAMES, "attention", "vision_all", "vision_focus")
"""The terms of this package, by their names in the objective."""


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
