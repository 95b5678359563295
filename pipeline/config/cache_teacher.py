"""The configuration of stage one."""

from dataclasses import dataclass, field

from alignkd.pipeline.config.defaults import DEFAULT_MAX_LENGTH
from alignkd.pipeline.config.targets import TargetSettings


@dataclass(frozen=True)
class CacheTeacherConfig:
    """What ``alignkd cache-teacher`` was asked to do. ``batch_tokens`` counts positions after padding.

    ``alignment``: whether rows hold attention and vision tokens ("targets"), or the cache holds once what stage two
    recomputes them from ("slice"), ``slice_without_tower`` without its vision tower. ``attention_layers``: see
    :func:`alignkd.losses.layers.find_teacher_layers`.
    """

    teacher: str
    data: str
    images: str | None
    cache: str
    template: str | None = None
    max_length: int = DEFAULT_MAX_LENGTH
    shard_format: str = "zarr"
    settings: TargetSettings = field(default_factory=TargetSettings)
    alignment: str = "targets"
    slice_without_tower: bool = False
    attention_layers: str = "first"
    shard_samples: int = 512
    batch_tokens: int = 16_384
    dtype: str = "float32"
    device: str | None = None
    vision_tower: str | None = None
    max_rejected: int = 100
    rank: int | None = None
    world_size: int | None = None
    steal: bool = False
    host_threads: int = 4
