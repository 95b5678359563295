"""The recipe: every number of the objective is a field here and nowhere else. Imports no torch."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, get_args

from alignkd.errors import ConfigError
from alignkd.losses.layers import check_layers
from alignkd.losses.term_registry import find_term
from alignkd.targets.logit_settings import DIVERGENCE_NAMES

HeadMap = Literal["mixture", "convolution", "mean"]
WidthMap = Literal["lift", "isometry", "projection"]
AttentionDistance = Literal["mse", "kl", "cosine"]
AttentionRows = Literal["text", "answer", "instruction"]
Weighting = Literal["fixed", "learned"]
TokenWeighting = Literal["uniform", "advantage"]
Projector = Literal["own", "teacher"]
_CHOICES = {
    "head_map": HeadMap,
    "width_map": WidthMap,
    "attention_distance": AttentionDistance,
    "attention_rows": AttentionRows,
    "weighting": Weighting,
    "token_weighting": TokenWeighting,
    "projector": Projector,
}

WEIGHTS = ("supervised", *DIVERGENCE_NAMES, "attention", "vision")
"""The fields that are weights of this package's terms."""


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
    ``token_top_share`` and ``token_lambda``, see :mod:`alignkd.losses.token_weights`. ``projector``: see
    :mod:`alignkd.models.teacher_projector`. ``extra``: weights of terms from outside
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
    projector: Projector = "own"
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
        if self.projector == "teacher" and self.vision > 0:
            raise ConfigError(
                f"recipe {self.name}: vision is {self.vision} with projector teacher, where vision tokens come from"
                " the teacher's: the term is 0 by construction; set vision to 0"
            )
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
        return {name: getattr(self, name) for name in WEIGHTS} | dict(self.extra)

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
