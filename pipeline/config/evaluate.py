"""The configuration of ``alignkd evaluate``."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EvaluateConfig:
    """What ``alignkd evaluate`` was asked to do."""

    model: str
    data: str
    images: str | None
    out: str | None = None
    metric: str = "exact"
    template: str | None = None
    batch_size: int = 64
    max_new_tokens: int = 32
    dtype: str = "float32"
    device: str | None = None
    vision_tower: str | None = None
    max_rejected: int = 100
