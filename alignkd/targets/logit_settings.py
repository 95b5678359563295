"""Which logit targets a cache holds."""

from dataclasses import dataclass, fields
from typing import Any

from alignkd.settings import Settings, setting

DIVERGENCE_NAMES = ("reverse_kl", "forward_kl", "jensen_shannon")
"""The terms that compare answer distributions; :mod:`alignkd.losses.answer_loss.forms` has their formulas."""

LOGIT_KINDS = ("topk", "sampled", "sketch", "hidden")


@dataclass(frozen=True)
class LogitSettings(Settings):
    """Which logit targets a cache holds.

    ``vocabulary``: distributions over the first ids only, this many, normalised over them; None: over all columns of the
    teacher's output head.
    """

    kind: str = setting(
        "sketch",
        group="targets",
        flag="logits",
        choices=LOGIT_KINDS,
        help="What is stored of an answer token's distribution: see docs/cache-size.md.",
    )
    top_k: int = setting(16, group="targets", at_least=1, help="Tokens stored with their log-probability.")
    draws: int = setting(8, group="targets", at_least=1, help="sampled: tokens drawn from the rest.")
    sketch_bytes: int = setting(
        64, group="targets", at_least=1, help="sketch: bytes that describe the distribution of the rest."
    )
    hidden_bits: int = setting(8, group="targets", choices=(8, 16), help="hidden: bits of each feature.")
    temperature: float = setting(1.0, group="targets", more_than=0, help="Temperature of the logits.")
    vocabulary: int | None = setting(
        None,
        group="targets",
        flag="logit-vocabulary",
        at_least=1,
        default_text="all of the teacher's output head",
        help="Store the distribution over the first N ids only, for a student with fewer tokens.",
    )

    def fingerprint(self) -> dict[str, Any]:
        """The settings that matter for this kind; a temperature of None means that any temperature can be used."""
        known = {f.name: getattr(self, f.name) for f in fields(self)}
        matters = {
            "topk": ("top_k", "temperature"),
            "sampled": ("top_k", "draws", "temperature"),
            "sketch": ("top_k", "sketch_bytes", "temperature"),
            "hidden": ("hidden_bits",),
        }[self.kind]
        part = {} if self.vocabulary is None else {"vocabulary": self.vocabulary}
        return {"kind": self.kind, "temperature": None, **{name: known[name] for name in matters}, **part}
