"""The interface of lmms-eval 0.7.3 that a plug-in meets, for tests that run without it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


class CacheHook:
    def __init__(self):
        self.kept = []

    def add_partial(self, kind, request, result):
        self.kept.append((kind, request, result))


class Lmms:
    is_simple = True

    def __init__(self):
        self._rank, self._world_size = 0, 1
        self.cache_hook, self.task_dict = CacheHook(), {}

    @property
    def rank(self):
        return self._rank

    @property
    def world_size(self):
        return self._world_size

    def clean(self):
        """Its own frees modules."""


def install(monkeypatch):
    """Put the stub in the place of the package, whether or not that is installed."""
    for name, content in (
        ("lmms_eval", {}),
        ("lmms_eval.api", {}),
        ("lmms_eval.api.model", {"lmms": Lmms}),
        ("lmms_eval.models", {}),
        ("lmms_eval.models.registry_v2", {"ModelManifest": ModelManifest}),
    ):
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)


def request(text, pictures, number=0, **settings):
    """A request of a "simple" task, whose documents are lists of pictures."""
    return SimpleNamespace(args=(text, {"until": ["\n\n"], **settings}, list, number, "task", "test"))
