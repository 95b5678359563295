"""Which checkpoints may be picked up: those that are whole.

A record with the size of every file is written last, when all processes have written theirs and all of it is on the disk.
A folder without one, or whose files are not as it says, was cut short.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignkd.cache_store.storage.local import LocalStorage

RECORD = "complete.json"


def seal(folder: Path, state: Mapping[str, Any]) -> None:
    """Declare a checkpoint whole, with what a resumed run must know besides what Trainer saves."""
    sizes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != RECORD:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            sizes[str(path.relative_to(folder))] = path.stat().st_size
    storage = LocalStorage(folder)
    storage.delete(RECORD)
    storage.write(RECORD, json.dumps({"files": sizes, "state": dict(state)}).encode())


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The whole checkpoint of the highest step, and its state; None where there is none."""
    found = sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True)
    for checkpoint in found:
        state = _state(checkpoint)
        if state is not None:
            return checkpoint, state
    return None


def sweep(folder: Path) -> None:
    """Remove what is not whole: Trainer counts folders, and would keep such a one in place of a whole one."""
    for checkpoint in folder.glob("checkpoint-*"):
        if _state(checkpoint) is None:
            shutil.rmtree(checkpoint)


def step_of(checkpoint: Path) -> int:
    """The step a checkpoint's folder is named after; -1 for a name that has none."""
    text = checkpoint.name.rpartition("-")[2]
    return int(text) if text.isdigit() else -1


def _state(checkpoint: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((checkpoint / RECORD).read_text())
        whole = all((checkpoint / name).stat().st_size == size for name, size in record["files"].items())
        state: dict[str, Any] = record["state"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return state if whole else None
