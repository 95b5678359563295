"""Which targets a cache holds, and how each is stored."""

from dataclasses import dataclass, field
from typing import Any

from alignkd.pipeline.config.cache_layout import TARGETS
from alignkd.targets.logit_settings import LogitSettings


@dataclass(frozen=True)
class TargetSettings:
    """Which targets a cache holds, and how. ``attention_layers`` are the teacher's, of ``layers`` that it has.

    ``across``: rows say where their vision tokens lie and which characters their ids cover, for students of another make.
    """

    targets: tuple[str, ...] = TARGETS
    attention: str = "per-head"
    logits: LogitSettings = field(default_factory=LogitSettings)
    attention_codec: str = "sqrt8"
    vision_codec: str = "int8-rows"
    attention_layers: tuple[int, ...] = (0,)
    layers: int = 1
    across: bool = True

    def fingerprint(self) -> dict[str, Any]:
        """The part of a cache's fingerprint that these settings are."""
        others = "attention" in self.targets and self.attention_layers != (0,)
        return {
            **({"attention_layers": {"held": list(self.attention_layers), "of": self.layers}} if others else {}),
            "attention": self.attention if "attention" in self.targets else None,
            "vision": "vision" in self.targets,
            "logits": self.logits.fingerprint() if "logits" in self.targets else None,
        }
