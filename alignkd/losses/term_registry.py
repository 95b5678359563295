"""Loss terms from outside the package, by name: what :mod:`alignkd.losses.custom_terms` has registered. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from alignkd.errors import ConfigError
from alignkd.targets.logit_settings import DIVERGENCE_NAMES

AveragedOver = Literal["with_image", "with_text_after_image", "samples"]
"""Which samples of a step a term is averaged over: those with an image, those with text after an image, or all."""

AVERAGED_OVER: tuple[str, ...] = get_args(AveragedOver)


@dataclass(frozen=True)
class RegisteredTerm:
    """A term: a class of ``nn.Module``, which is given :class:`alignkd.losses.contract.TermShapes`, or a function.

    ``needs``: the targets without which it cannot be computed, of ``attention``, ``vision`` and ``logits``.
    """

    name: str
    made_by: Callable[..., Any]
    needs: frozenset[str]
    averaged_over: AveragedOver


_TERMS: dict[str, RegisteredTerm] = {}


def registered_terms() -> tuple[str, ...]:
    """The names of all registered terms."""
    return tuple(_TERMS)


def add_term(term: RegisteredTerm) -> None:
    """Register a term under its name.

    Raises:
        ConfigError: another term has the name.
    """
    if term.name in _TERMS:
        before = _TERMS[term.name].made_by
        raise ConfigError(
            f"loss term {term.name!r} is registered already, by {_where(before)}; {_where(term.made_by)} needs another name"
        )
    _TERMS[term.name] = term


def find_term(name: str) -> RegisteredTerm:
    """The term of a name.

    Raises:
        ConfigError: no such term; lists those that are registered.
    """
    if name not in _TERMS:
        known = ", ".join(_TERMS) or "none"
        raise ConfigError(
            f"loss term {name!r} is not registered (registered: {known}); import the module that registers it before the"
            " recipe is read"
        )
    return _TERMS[name]


_ANSWERS = ("supervised", *DIVERGENCE_NAMES)
_SAMPLES = {"attention": "with_text_after_image", "vision_all": "with_image", "vision_focus": "with_image"}


def averaged_over(term: str) -> str:
    """What a term of the objective is a mean over: a field of :class:`alignkd.inputs.batch.Counts`."""
    if term in _ANSWERS:
        return "answers"
    return _SAMPLES[term] if term in _SAMPLES else find_term(term).averaged_over


def _where(made_by: Callable[..., Any]) -> str:
    return f"{made_by.__module__}.{made_by.__qualname__}"
