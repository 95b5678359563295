"""The configuration of ``alignkd show``."""

from dataclasses import dataclass

from alignkd.pipeline.config.defaults import DEFAULT_MAX_LENGTH


@dataclass(frozen=True)
class ShowConfig:
    """What ``alignkd show`` was asked to do; the first sample where no id is given."""

    model: str
    data: str
    images: str | None
    id: str | None = None
    template: str | None = None
    max_length: int = DEFAULT_MAX_LENGTH
    save: str | None = None
    plot: str | None = None
    dtype: str = "float32"
    device: str | None = None
    vision_tower: str | None = None
