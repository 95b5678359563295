"""``alignkd demo``: the whole path on easy-VQA, from image-text pairs to a distilled student, with a report."""

from alignkd.pipeline.config.demo import DemoConfig
from alignkd.pipeline.demo.run import DemoResult, demo

__all__ = ["DemoConfig", "DemoResult", "demo"]
