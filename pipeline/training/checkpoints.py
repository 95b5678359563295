"""Which checkpoints a run may resume from: those that are complete, and hold what was written.

When all processes have written their parts, the files are brought to the disk and their SHA-256 is computed at the same time,
from the pages that the system still holds. A record with the size and the digest of every file, and with a digest of its own,
is written last. A folder without that record was cut short; one that differs from it is damaged.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alignkd.cache_store.storage.local import LocalStorage
from alignkd.errors import CheckpointError
from alignkd.pipeline.runtime.out_folder.write_faults import explained_write_faults

RECORD = "complete.json"

_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})")
_THREADS = 8
_RECORD_BYTES = 2**26

_logger = logging.getLogger(__name__)


def mark_complete(folder: Path, state: Mapping[str, Any]) -> None:
    """Seal a checkpoint: write its record, with the ``state`` that a resumed run needs besides what Trainer saves."""
    paths = {
        str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != RECORD
    }
    with ThreadPoolExecutor(_THREADS) as threads:
        written = [threads.submit(_to_disk, path) for path in paths.values()]
        digests = dict(zip(paths, threads.map(_sha256, paths.values()), strict=True))
        for each in written:
            each.result()
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    content = {"files": sizes, "sha256": digests, "state": dict(state)}
    storage = LocalStorage(folder)
    storage.delete(RECORD)
    storage.write(RECORD, json.dumps({**content, "seal": _seal(content)}).encode())
    _logger.info("checkpoint written: %s (%d bytes)", folder, sum(sizes.values()))


def find_latest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The whole checkpoint of the highest step, and its state; None where none was ever completed.

    Raises:
        CheckpointError: there are checkpoints that were complete once, and all of them are damaged.
    """
    damaged = []
    for checkpoint in sorted(own_checkpoints(folder), key=step_of, reverse=True):
        try:
            state = _state(checkpoint)
        except CheckpointError as error:
            damaged.append(str(error))
            _logger.warning("checkpoint skipped: %s", error)
            continue
        if state is not None:
            _logger.log(logging.WARNING if damaged else logging.INFO, "resume point found: %s", checkpoint)
            return checkpoint, state
        _logger.warning("checkpoint skipped, as it is not complete: %s", checkpoint)
    if damaged:
        raise CheckpointError(
            f"--resume: no checkpoint in {folder} is whole: {'; '.join(damaged)}. Restore one from a copy, or begin again in"
            " another --out"
        )
    return None


def remove_incomplete(folder: Path, good: Path | None = None) -> None:
    """Remove checkpoints that are not whole, which no run can use. ``good``: one that is known to be whole."""
    for checkpoint in own_checkpoints(folder):
        if checkpoint != good and not _is_whole(checkpoint):
            remove(checkpoint)
            _logger.info("incomplete checkpoint removed: %s", checkpoint)


def remove_oldest(folder: Path, keep: int) -> None:
    """Remove all but the ``keep`` checkpoints of the highest steps. Folders with other names are the user's own."""
    for checkpoint in sorted(own_checkpoints(folder), key=step_of)[:-keep]:
        remove(checkpoint)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, its record first: a kill half-way leaves one that is incomplete, not one that is damaged."""
    (checkpoint / RECORD).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


@contextmanager
def sealed_or_removed(folder: Path, *, first: bool) -> Iterator[None]:
    """Write a checkpoint. What is left of one that fails is removed, since on a full disk its space is needed.

    Raises:
        TransientError: the disk is full, read-only or forbidden.
        CheckpointError: the run's folder is gone.
    """

    def kept() -> str:
        whole = [path for path in own_checkpoints(folder.parent) if (path / RECORD).is_file()]
        last = max(whole, key=step_of, default=None)
        return f"Everything up to step {step_of(last)} is kept in {last}." if last else ""

    try:
        with explained_write_faults(folder.parent, folder.name, kept):
            yield
    except BaseException:
        if first and not (folder / RECORD).exists():
            shutil.rmtree(folder, ignore_errors=True)
        raise


def own_checkpoints(folder: Path) -> list[Path]:
    """The folders that have exactly the name of a checkpoint, links left out."""
    found = [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return [path for path in found if path.is_dir() and not path.is_symlink()]


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint's folder; -1 for a name without one."""
    found = _NAME.fullmatch(checkpoint.name)
    return int(found[1]) if found else -1


def _is_whole(checkpoint: Path) -> bool:
    try:
        return _state(checkpoint) is not None
    except CheckpointError:
        return False


def _state(checkpoint: Path) -> dict[str, Any] | None:
    """What a checkpoint's record says; None where it has none, and so was cut short.

    Raises:
        CheckpointError: something differs from the record, or the record from its own digest.
    """
    try:
        path = checkpoint / RECORD
        if path.stat().st_size > _RECORD_BYTES:
            raise CheckpointError(f"{path} is {path.stat().st_size} bytes long, expected at most {_RECORD_BYTES}")
        record = json.loads(path.read_bytes())
        seal = record.pop("seal")
        files, digests, state = record["files"], record["sha256"], record["state"]
        if seal != _seal(record) or files.keys() != digests.keys():
            raise CheckpointError(f"{path} was changed after it was written")
        int(state.get("processes", 1))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is damaged, or of another version of alignkd") from error
    with ThreadPoolExecutor(_THREADS) as threads:
        found = [threads.submit(_problem, checkpoint, name, files[name], digests[name]) for name in files]
        problems = [problem for each in found if (problem := each.result())]
    if problems:
        raise CheckpointError(f"{checkpoint} is damaged: {'; '.join(problems[:4])}")
    return dict(state)


def _problem(checkpoint: Path, name: str, size: int, digest: str) -> str:
    path = checkpoint / name
    if not path.resolve().is_relative_to(checkpoint.resolve()):
        return f"{name} lies outside of it"
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != size:
        return f"{name} has {path.stat().st_size} bytes, expected {size}"
    return "" if _sha256(path) == digest else f"{name} differs from its SHA-256"


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
