"""Logit targets: what a cache keeps of the teacher's answer distributions, in four forms."""

from alignkd.targets.logit_settings import LogitSettings
from alignkd.targets.logits.base import Calibration, LogitCodec
from alignkd.targets.logits.dense import Hidden, Sketched
from alignkd.targets.logits.topk import Sampled, TopK

LOGIT_CODECS: dict[str, type[LogitCodec]] = {codec.kind: codec for codec in (TopK, Sampled, Sketched, Hidden)}

__all__ = ["LOGIT_CODECS", "Calibration", "LogitCodec", "LogitSettings"]
