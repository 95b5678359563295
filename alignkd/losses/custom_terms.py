"""Loss terms of your own, without a change to this package. Imports no torch.

Register a function, and give it a weight::

    @register_term("my_term", needs=("vision",), averaged_over="with_image")
    def my_term(inputs):                      # inputs: alignkd.losses.contract.TermInputs
        difference = inputs.student_vision_BVD - inputs.targets.vision_BVD
        ...
        return value_B                        # one value per sample

    recipe = get_recipe("align-kd", {"my_term": "0.5"})    # or --set my_term=0.5, or a line of a recipe's YAML file

A class of ``nn.Module`` is registered in the same way. It is constructed with :class:`alignkd.losses.contract.TermShapes`, so
that it may have parameters: they train with the student and are saved in its checkpoints. Its ``forward`` is what the function
is above.
"""

from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, TypeVar

from alignkd.errors import ConfigError
from alignkd.losses.recipes import TERMS, Recipe
from alignkd.losses.term_registry import AVERAGED_OVER, AveragedOver, RegisteredTerm, add_term

_TARGETS = ("attention", "vision", "logits", "advantage")

_LOGGED = (
    *(
        "loss",
        "step",
        "epoch",
        "samples",
        "tokens",
        "answers",
        "truncated",
        "seconds",
        "tokens_per_second",
        "samples_per_second",
    ),
    *("padding", "padding_share", "data_wait_share", "attention_contrast", "peak_memory_bytes", "learning_rate", "grad_norm"),
)
"""Keys of a line of metrics.jsonl, where each term stands under its name."""

RESERVED = frozenset({"base", *_LOGGED, *TERMS, *(f.name for f in fields(Recipe))})
"""Names that no term from outside may have."""

_Term = TypeVar("_Term", bound=Callable[..., Any])


def register_term(
    name: str, *, needs: Iterable[str] = (), averaged_over: AveragedOver = "with_image"
) -> Callable[[_Term], _Term]:
    """A decorator that registers a function, or a class of ``nn.Module``, as a loss term.

    Recipes then take ``name`` as a weight; a term of weight 0 is not computed.

    Args:
        name: What recipes, log lines and metrics call it: lower-case letters, digits and underscores.
        needs: The targets it cannot be computed without, of ``attention``, ``vision``, ``logits`` and ``advantage``. A cache
            without them is refused, and so is a recipe without a teacher.
        averaged_over: The samples of a step that count in its mean: those ``with_image``, those ``with_text_after_image``, or
            all ``samples``. The values of other samples are dropped.

    Raises:
        ConfigError: a name that is taken or cannot be used, an unknown target, or an unknown ``averaged_over``.
    """
    if not (name.isidentifier() and name.isascii() and name == name.lower()) or name.startswith("_"):
        raise ConfigError(f"loss term {name!r}: expected a name of lower-case letters, digits and underscores")
    if name in RESERVED:
        raise ConfigError(f"loss term {name!r}: recipes and log lines use this name already; choose another")
    wanted = frozenset([needs] if isinstance(needs, str) else needs)
    if unknown := sorted(wanted - set(_TARGETS)):
        raise ConfigError(f"loss term {name!r} needs {', '.join(unknown)}; known targets are {', '.join(_TARGETS)}")
    if averaged_over not in AVERAGED_OVER:
        raise ConfigError(f"loss term {name!r}: averaged_over is {averaged_over!r}, expected {', '.join(AVERAGED_OVER)}")

    def register(made_by: _Term) -> _Term:
        add_term(RegisteredTerm(name, made_by, wanted, averaged_over))
        return made_by

    return register
