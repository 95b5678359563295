"""alignkd: distil a large vision-language model into a small one, from a cache of the teacher's targets.

1. ``cache_teacher`` runs the teacher once and writes its first-layer text-to-vision attention, projected vision tokens and
   top-k logits into a sharded cache.
2. ``distill`` trains the student from that cache; the teacher is never loaded.

The names below are the public API. Each is imported when it is first used, so that ``import alignkd`` loads neither torch
nor transformers.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from alignkd.version import __version__

if TYPE_CHECKING:
    from alignkd.cache_store.protocol.reader import CacheReader as CacheReader
    from alignkd.errors import AlignkdError as AlignkdError
    from alignkd.losses.custom_terms import register_term as register_term
    from alignkd.losses.recipes import Recipe as Recipe
    from alignkd.losses.recipes import get_recipe as get_recipe
    from alignkd.models.loading import load_vlm as load_vlm
    from alignkd.models.loading import save_vlm as save_vlm
    from alignkd.models.registry import FamilyRecord as FamilyRecord
    from alignkd.models.registry import register_family as register_family
    from alignkd.objective import Objective as Objective
    from alignkd.pipeline.answer.run import answer as answer
    from alignkd.pipeline.cache_admin.webdataset_rows import decode_row as decode_row
    from alignkd.pipeline.config.answer import AnswerConfig as AnswerConfig
    from alignkd.pipeline.config.cache_teacher import CacheTeacherConfig as CacheTeacherConfig
    from alignkd.pipeline.config.distill import DistillConfig as DistillConfig
    from alignkd.pipeline.config.evaluate import EvaluateConfig as EvaluateConfig
    from alignkd.pipeline.config.targets import TargetSettings as TargetSettings
    from alignkd.pipeline.evaluate.metrics import register_metric as register_metric
    from alignkd.pipeline.evaluate.runner import evaluate as evaluate
    from alignkd.pipeline.stage_one.worker import cache_teacher as cache_teacher
    from alignkd.pipeline.training.distillation import open_distillation as open_distillation
    from alignkd.pipeline.training.run import distill as distill
    from alignkd.plugins import load_plugins as load_plugins
    from alignkd.targets.logit_settings import LogitSettings as LogitSettings

_PUBLIC = {
    "AlignkdError": "errors",
    "AnswerConfig": "pipeline.config.answer",
    "CacheReader": "cache_store.protocol.reader",
    "CacheTeacherConfig": "pipeline.config.cache_teacher",
    "DistillConfig": "pipeline.config.distill",
    "EvaluateConfig": "pipeline.config.evaluate",
    "FamilyRecord": "models.registry",
    "LogitSettings": "targets.logit_settings",
    "Objective": "objective",
    "Recipe": "losses.recipes",
    "TargetSettings": "pipeline.config.targets",
    "answer": "pipeline.answer.run",
    "cache_teacher": "pipeline.stage_one.worker",
    "decode_row": "pipeline.cache_admin.webdataset_rows",
    "distill": "pipeline.training.run",
    "evaluate": "pipeline.evaluate.runner",
    "get_recipe": "losses.recipes",
    "load_plugins": "plugins",
    "load_vlm": "models.loading",
    "open_distillation": "pipeline.training.distillation",
    "register_family": "models.registry",
    "register_metric": "pipeline.evaluate.metrics",
    "register_term": "losses.custom_terms",
    "save_vlm": "models.loading",
}
"""The module that each public name is in."""

__all__ = ["__version__", *_PUBLIC]

logging.getLogger("alignkd").addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'alignkd' has no attribute {name!r}")
    value = getattr(import_module(f"alignkd.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
