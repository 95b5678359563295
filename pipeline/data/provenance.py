"""Who wrote the answers of a sample: the data itself, or a model; and which of them a job takes.

A record says so in ``"provenance": {"model": name, "weights": digest, "settings": {...}}``, as ``alignkd answer`` writes it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from alignkd.pipeline.config.shared import ANSWERS

LONGEST = 512
"""Characters of a model's name, or of a digest, that are read."""

NOT_READ = "'provenance' is not read: expected an object with the texts 'model' and 'weights'"


class Author(NamedTuple):
    """The model that wrote the answers of a sample, and the digest of its weights; both "" for the data's own answers."""

    model: str = ""
    weights: str = ""

    def __str__(self) -> str:
        return f"{self.model} (weights {self.weights[:12] or 'unknown'})" if self.model else "the data"


DATA = Author()


def read_author(value: Any) -> Author | None:
    """The author that the field ``provenance`` of a record names; None for a value of another form.

    No value, null or one of another form says nothing about the answers, which then count as the data's own.
    """
    if value is None:
        return DATA
    if not isinstance(value, dict):
        return None
    model, weights = value.get("model"), value.get("weights", "")
    if not isinstance(model, str) or not isinstance(weights, str) or not 0 < len(model) <= LONGEST or len(weights) > LONGEST:
        return None
    return Author(model, weights)


@dataclass(frozen=True)
class AnswerChoice:
    """Which answers a job takes. ``weights``: the digest of the teacher's, where its own are chosen."""

    answers: str = "both"
    weights: str = ""

    def takes(self, author: Author) -> bool:
        """Whether answers of this author are taken: those of other models than the teacher with ``both`` alone."""
        if self.answers == "both":
            return True
        return not author.model if self.answers == "data" else bool(author.model) and author.weights == self.weights

    def as_meta(self) -> dict[str, Any]:
        """What a plan keeps of the choice: nothing, if everything is taken."""
        given = {"answers": self.answers, "weights": self.weights}
        return {} if self.answers == "both" else {name: value for name, value in given.items() if value}

    @classmethod
    def of_meta(cls, meta: Mapping[str, Any]) -> "AnswerChoice":
        """The choice of a plan; everything, where it keeps none that is known."""
        answers, weights = meta.get("answers"), meta.get("weights", "")
        if answers not in ANSWERS or not isinstance(weights, str):
            return cls()
        return cls(answers, weights)
