"""The held-out samples as data of a configuration."""

from dataclasses import replace

from alignkd.errors import ConfigError
from alignkd.pipeline.config.distill import DistillConfig
from alignkd.pipeline.config.shared import several


def held_out_config(config: DistillConfig) -> DistillConfig:
    """The configuration of a run with its held-out samples in place of those that it learns from: all of them, once each."""
    assert config.eval_data is not None
    images = config.eval_images or config.images
    if config.eval_images is None and len(several(images)) > 1:
        raise ConfigError("--images is given several times: give --eval-images, the folder of the held-out samples' images")
    return replace(config, data=config.eval_data, images=images, data_weight=(), limit=None, sample=None, resume=False)
