"""The target settings of a cache, resolved for the teacher that was loaded."""

from dataclasses import replace

from alignkd.capture.teacher_slice import check_sliceable
from alignkd.errors import AlignkdError, ConfigError
from alignkd.losses.layers import find_teacher_layers
from alignkd.models.vlm import Vlm
from alignkd.pipeline.cache_io.logits import clamp_to_teacher
from alignkd.pipeline.config.cache_layout import SLICED
from alignkd.pipeline.config.cache_teacher import CacheTeacherConfig
from alignkd.pipeline.config.targets import TargetSettings


def resolve_targets(config: CacheTeacherConfig, teacher: Vlm) -> TargetSettings:
    """The settings with numbers limited to what the teacher has, and its layers by number.

    Raises:
        ConfigError: the teacher cannot give these targets, or options contradict each other.
    """
    settings = config.settings
    if config.alignment == "slice":
        check_sliceable(teacher)
    if settings.logits.vocabulary is not None and "logits" not in settings.targets:
        raise ConfigError(f"--logit-vocabulary {settings.logits.vocabulary} needs logits among --targets")
    logits = clamp_to_teacher(settings.logits, teacher.vocabulary, teacher.hidden_size)
    return replace(settings, logits=logits, attention_layers=_attention_layers(config, teacher.layers), layers=teacher.layers)


def _attention_layers(config: CacheTeacherConfig, depth: int) -> tuple[int, ...]:
    """The teacher's layers whose attention is cached."""
    try:
        layers = find_teacher_layers(config.attention_layers, depth)
    except AlignkdError as error:
        raise ConfigError(f"--attention-layers: {error}") from error
    if layers != (0,) and config.alignment == "slice":
        raise ConfigError(
            "--alignment slice gives the attention of the first layer only, not of --attention-layers"
            f" {config.attention_layers}, which needs all layers before. Use --alignment targets"
        )
    if layers != (0,) and "attention" not in config.settings.targets:
        raise ConfigError(f"--attention-layers {config.attention_layers} needs attention among --targets")
    return layers


def settings_of_rows(settings: TargetSettings, alignment: str) -> TargetSettings:
    """The targets that rows hold: all, or those that a slice does not give.

    A slice serves only students of the teacher's architecture, so its rows need no spans and regions.
    """
    if alignment == "targets":
        return settings
    return replace(settings, targets=tuple(name for name in settings.targets if name not in SLICED), cross_model=False)
