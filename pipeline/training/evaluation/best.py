"""The best student so far: which figure decides, how long none was better, and the folder that holds the student.

A better student is written beside the folder and takes its place in two renames: a kill leaves the one of before or the new
one, under the folder's name or, between the renames, under that of the old one, which :func:`restore` mends.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkd.errors import CheckpointError
from alignkd.pipeline.runtime.out_folder.write_faults import explained_write_faults

RECORD = "best.json"
FOLDER = "best"
_RISING = ("agreement",)
_BYTES = 2**24


@dataclass
class Best:
    """The best value of one figure. ``rises``: whether more is better. ``since``: evaluations since the best one."""

    name: str
    rises: bool
    value: float | None = None
    step: int = 0
    since: int = 0

    @classmethod
    def of(cls, name: str, benchmarks: Mapping[str, Any]) -> "Best":
        """Losses fall, agreement and scores rise."""
        return cls(name, name in _RISING or name in benchmarks)

    def add(self, value: float | None, step: int) -> bool:
        """Count an evaluation; whether it is the best. One that is not finite never is."""
        better = value is not None and math.isfinite(value)
        if better and self.value is not None:
            assert value is not None
            better = value > self.value if self.rises else value < self.value
        if better:
            self.value, self.step, self.since = value, step, 0
        else:
            self.since += 1
        return better

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"name": self.name, "value": self.value, "step": self.step, "since": self.since}

    def resume(self, state: Any) -> None:
        """Continue from a checkpoint's.

        Raises:
            CheckpointError: it is damaged.
        """
        if state is None:
            return
        try:
            value, step, since = state["value"], int(state["step"]), int(state["since"])
            self.value, self.step, self.since = None if value is None else float(value), step, since
        except (TypeError, KeyError, ValueError) as error:
            raise CheckpointError(
                "--resume: what the checkpoint says of the best student is damaged: remove its folder, and --resume starts from"
                " the checkpoint before it"
            ) from error


def keep(out: Path, best: Best, write: Callable[[Path], None]) -> None:
    """Replace ``out/best`` by what ``write`` puts into a folder, sealed by a record of its files.

    Raises:
        TransientError: the disk is full, read-only or forbidden; the best of before is kept.
        CheckpointError: the run's folder is gone.
    """
    part, old, folder = (out / f"{FOLDER}{end}" for end in (".part", ".old", ""))
    with explained_write_faults(out, "the best student"):
        restore(out)
        for left in (part, old):
            shutil.rmtree(left, ignore_errors=True)
        part.mkdir()
        write(part)
        files = {str(path.relative_to(part)): _sha256(path) for path in sorted(part.rglob("*")) if path.is_file()}
        record: dict[str, Any] = {"name": best.name, "value": best.value, "step": best.step, "sha256": files}
        (part / RECORD).write_text(json.dumps(record | {"seal": _seal(record)}, indent=2) + "\n")
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def restore(out: Path) -> None:
    """Give the best of before its name back, where a kill came before the new one had it."""
    old, folder = out / f"{FOLDER}.old", out / FOLDER
    if old.is_dir() and not old.is_symlink() and not folder.exists():
        old.rename(folder)


def read_best(out: Path) -> dict[str, Any] | None:
    """The name, value and step of the best student in a run's folder; None where none is whole there."""
    path = out / FOLDER / RECORD
    try:
        if path.stat().st_size > _BYTES:
            return None
        record = json.loads(path.read_bytes())
        if record.pop("seal") != _seal(record):
            return None
        if any(_sha256(out / FOLDER / name) != digest for name, digest in record["sha256"].items()):
            return None
        return {"name": record["name"], "value": record["value"], "step": record["step"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _seal(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
