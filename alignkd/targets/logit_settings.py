"""Which logit targets a cache holds."""

from dataclasses import dataclass, fields
from typing import Any

from alignkd.errors import ConfigError

DIVERGENCE_NAMES = ("reverse_kl", "forward_kl", "jensen_shannon")
"""The terms that compare answer distributions; :mod:`alignkd.losses.answer_loss.forms` has their formulas."""


@dataclass(frozen=True)
class LogitSettings:
    """Which logit targets a cache holds.

    ``kind``: ``topk``, ``sampled``, ``sketch`` or ``hidden``. ``top_k``: tokens kept exactly (all but ``hidden``).
    ``draws``: tokens drawn from the rest (``sampled``). ``sketch_bytes``: bytes of an answer token's sketch (``sketch``).
    ``hidden_bits``: 8 or 16 (``hidden``). ``vocabulary``: the distributions are over this many first ids, normalised over
    them; None for all columns of the teacher's head.

    Raises:
        ConfigError: a value out of range.
    """

    kind: str = "sketch"
    top_k: int = 16
    draws: int = 8
    sketch_bytes: int = 64
    hidden_bits: int = 8
    temperature: float = 1.0
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("topk", "sampled", "sketch", "hidden"):
            raise ConfigError(f"logit targets {self.kind!r}: expected topk, sampled, sketch or hidden")
        for name in ("top_k", "draws", "sketch_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"logit targets: {name} is {getattr(self, name)}, expected 1 or more")
        if self.vocabulary is not None and self.vocabulary < 1:
            raise ConfigError(f"logit targets: vocabulary is {self.vocabulary}, expected 1 or more")
        if self.hidden_bits not in (8, 16):
            raise ConfigError(f"logit targets: hidden_bits is {self.hidden_bits}, expected 8 or 16")

    def fingerprint(self) -> dict[str, Any]:
        """The settings that matter for this kind; a temperature of None means any temperature."""
        known = {f.name: getattr(self, f.name) for f in fields(self)}
        matters = {
            "topk": ("top_k", "temperature"),
            "sampled": ("top_k", "draws", "temperature"),
            "sketch": ("top_k", "sketch_bytes", "temperature"),
            "hidden": ("hidden_bits",),
        }[self.kind]
        part = {} if self.vocabulary is None else {"vocabulary": self.vocabulary}
        return {"kind": self.kind, "temperature": None, **{name: known[name] for name in matters}, **part}
