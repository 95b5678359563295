"""Settings that take a model: a local folder, or its name on the Hub.

A job first pins its names (:func:`pin_models`): each becomes ``ORG/NAME@COMMIT``, which is what records keep, and what a
resumed run goes on with. Where a model is loaded, :func:`model_folder` gives its folder.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from alignkd.errors import CheckpointError
from alignkd.pipeline.hub.download import download
from alignkd.pipeline.hub.messages import incomplete, not_here
from alignkd.pipeline.hub.names import ModelName, name_of, parse_name
from alignkd.pipeline.hub.snapshots import TOWER, TOWER_SETTINGS, WHOLE_MODEL, Needs, Snapshot, find_snapshot
from alignkd.settings import Settings

C = TypeVar("C", bound=Settings)

MODEL_SETTINGS: Mapping[str, Needs] = {
    **dict.fromkeys(("teacher", "student", "model", "online_teacher", "language_model"), WHOLE_MODEL),
    "tower": TOWER,
    "vision_tower": TOWER_SETTINGS,
}
"""The settings that take a model, in whichever configuration, and what is needed of it."""


def pin_models(config: C, recorded: Mapping[str, Any] | None = None) -> C:
    """The configuration with every name of a model pinned to a commit; folders stay as they are.

    With its setting ``download``, what the local cache lacks is fetched. ``recorded``: the configuration of the run that goes
    on, whose commits are taken for names without a revision.

    Raises:
        CheckpointError: a model that is neither a folder nor in the cache whole, and cannot be fetched.
        TransientError: the Hub is busy, or the connection broke.
    """
    allowed, changes = bool(getattr(config, "download", False)), dict[str, str]()
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in MODEL_SETTINGS and isinstance(value, str):
            before = (recorded or {}).get(field.name)
            pinned = pin_model(value, MODEL_SETTINGS[field.name], may_download=allowed, recorded=before)
            if pinned != value:
                changes[field.name] = pinned
    return replace(config, **changes) if changes else config


def pin_model(value: str, needs: Needs = WHOLE_MODEL, *, may_download: bool = False, recorded: object = None) -> str:
    """As :func:`pin_models`, of one setting."""
    name = name_of(value)
    if name is None:
        return value
    if name.revision is None and isinstance(recorded, str) and (before := parse_name(recorded)) is not None:
        name = before if before.repo == name.repo else name
    found = find_snapshot(name, needs)
    if found is not None and not found.missing:
        return str(found.name)
    if may_download:
        return str(download(name if found is None else found.name))
    if found is None and Path(value).parent.is_dir():
        return value  # more likely a path with a mistake in it, which the loader names
    raise _refusal(name, found)


def model_folder(value: str | Path, needs: Needs = WHOLE_MODEL) -> Path:
    """The folder of a model: the path itself, or that of a name in the local cache.

    Raises:
        CheckpointError: it looks like a name, and the cache does not hold it whole.
    """
    name = name_of(str(value))
    if name is None:
        return Path(value)
    found = find_snapshot(name, needs)
    if found is not None and not found.missing:
        return found.folder
    if found is None and not name.is_pinned and Path(value).parent.is_dir():
        return Path(value)
    raise _refusal(name, found)


def is_here(value: str) -> bool:
    """Whether a model's folder is on this machine, or a whole snapshot of its name."""
    name = name_of(value)
    found = find_snapshot(name) if name is not None else None
    return Path(value).is_dir() if found is None else not found.missing


def tower_folder(value: str | None) -> Path | None:
    """The folder that ``--vision-tower`` names, if it is given.

    Raises:
        CheckpointError: as :func:`model_folder`.
    """
    return model_folder(value, TOWER_SETTINGS) if value else None


def _refusal(name: ModelName, found: Snapshot | None) -> CheckpointError:
    return not_here(name) if found is None else incomplete(found)
