"""The entry point by which lmms-eval finds alignkd: ``lmms_eval --model alignkd``."""

from typing import Any

_CLASS = "alignkd.pipeline.evaluate.harness.lmms_eval_model.AlignkdModel"


def manifest() -> Any:
    """What lmms-eval registers (its ``ModelManifest``). Called by lmms-eval alone, which is there then."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="alignkd", simple_class_path=_CLASS)
