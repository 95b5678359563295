"""The terms of :mod:`alignkd.losses.more_terms`, registered: weights under ``extra``, 0 unless a recipe names them.

Imports no torch: a term is loaded when it is computed first.
"""

from importlib import import_module
from typing import Any

from alignkd.losses.term_registry import AveragedOver, RegisteredTerm, add_term


def _register(name: str, needs: frozenset[str], averaged_over: AveragedOver) -> None:
    """A term that is the function of its name, in the module of its name."""

    def term(inputs: Any) -> Any:
        return getattr(import_module(f"alignkd.losses.more_terms.{name}"), name)(inputs)

    add_term(RegisteredTerm(name, term, needs, averaged_over))


MORE_TERMS: dict[str, tuple[frozenset[str], AveragedOver]] = {"vision_relations": (frozenset({"vision"}), "with_image")}
"""What each needs, and what it is averaged over."""

for _name, _about in MORE_TERMS.items():
    _register(_name, *_about)
