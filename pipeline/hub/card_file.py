"""The card in a student's folder, from what its run recorded. The same function serves training and ``alignkd push``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignkd.cache_store.protocol.names import RUNS, our_names
from alignkd.cache_store.storage import open_storage
from alignkd.errors import AlignkdError
from alignkd.models.config_files import read_json
from alignkd.pipeline.hub.card import Card
from alignkd.pipeline.hub.card_text import short_name
from alignkd.pipeline.runtime.files import replace_text
from alignkd.plain_files import read_plain

NAME = "README.md"
_RUN_BYTES = 2**24


def write_card(
    student: Path, record: Mapping[str, Any], *, result: Mapping[str, Any] | None = None, best: Mapping[str, Any] | None = None
) -> None:
    """Write the card of a student that has just been saved.

    Raises:
        CheckpointError: the folder holds no ``config.json``.
    """
    replace_text(student / NAME, make_card(student, record, result=result, best=best).text())


def record_of(run: Path) -> dict[str, Any]:
    """A run's record; empty where it has none, or one that cannot be read."""
    try:
        found = json.loads(read_plain(run / "run.json", _RUN_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def make_card(student: Path, record: Mapping[str, Any], **others: Any) -> Card:
    """The card of a student's folder; ``others``: fields of :class:`Card`.

    Raises:
        CheckpointError: the folder holds no ``config.json``.
    """
    settings = record.get("configuration")
    teacher = teacher_of(settings) if isinstance(settings, Mapping) else None
    return Card(record, str(read_json(student / "config.json").get("model_type")), teacher=teacher, **others)


def teacher_of(settings: Mapping[str, Any]) -> str | None:
    """The teacher that a run learned from, without its folders: of the loop, else as the cache's records say."""
    online, cache = settings.get("online_teacher"), settings.get("cache")
    if isinstance(online, str):
        return short_name(online)
    named = [_teacher_of_cache(url) for url in ([cache] if isinstance(cache, str) else cache or ()) if isinstance(url, str)]
    return ", ".join(dict.fromkeys(short_name(name) for name in named if name)) or None


def _teacher_of_cache(url: str) -> str | None:
    try:
        storage = open_storage(url)
        for name in our_names(storage, RUNS):
            found = json.loads(storage.read(name, _RUN_BYTES))["configuration"]["teacher"]
            if isinstance(found, str):
                return found
    except (AlignkdError, OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # it is not there any more, or says nothing: a card does without
    return None
