"""Which targets a cache holds, and how each is stored."""

from dataclasses import dataclass
from typing import Any

from alignkd.inputs.destroyed import DESTROYED
from alignkd.pipeline.config.cache_layout import ADVANTAGE, ALL_TARGETS, TARGETS
from alignkd.pipeline.config.shared import ATTENTION_CODECS, VISION_CODECS
from alignkd.settings import Settings, setting
from alignkd.targets.logit_settings import LogitSettings


@dataclass(frozen=True)
class TargetSettings(Settings):
    """Which targets a cache holds, and how. ``attention_layers`` are the teacher's, of the ``layers`` that it has.

    ``cross_model``: rows also hold the coordinates of their vision tokens and the characters that their ids cover, which
    students of another architecture need. ``attention`` and ``vision`` may come from a slice; ``advantage`` costs one more pass
    of the teacher over the samples with an image.
    """

    targets: tuple[str, ...] = setting(
        TARGETS,
        group="targets",
        comma_separated=True,
        choices=ALL_TARGETS,
        help=f"Comma-separated targets to cache, of {', '.join(ALL_TARGETS)}.",
    )
    attention: str = setting("per-head", group="targets", choices=("per-head", "mean"), help="Store every head, or their mean.")
    logits: LogitSettings = setting(factory=LogitSettings, nested=True)
    attention_codec: str = setting("sqrt8", group="targets", choices=ATTENTION_CODECS, help="How attention is stored.")
    vision_codec: str = setting("int8-rows", group="targets", choices=VISION_CODECS, help="How vision tokens are stored.")
    attention_layers: tuple[int, ...] = (0,)
    layers: int = 1
    cross_model: bool = True

    def fingerprint(self) -> dict[str, Any]:
        """The part of a cache's fingerprint that these settings are."""
        others = "attention" in self.targets and self.attention_layers != (0,)
        return {
            **({"attention_layers": {"held": list(self.attention_layers), "of": self.layers}} if others else {}),
            "attention": self.attention if "attention" in self.targets else None,
            "vision": "vision" in self.targets,
            "logits": self.logits.fingerprint() if "logits" in self.targets else None,
            **({"advantage": DESTROYED} if ADVANTAGE in self.targets else {}),
        }
