"""A student with its card: into a repository of the Hugging Face Hub, or into a folder.

What is published is what loading reads, and the card; anything else that lies in the student's folder stays where it is.
"""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkd.errors import CheckpointError, ConfigError
from alignkd.pipeline.config.students import PushConfig
from alignkd.pipeline.hub.card import CardScore
from alignkd.pipeline.hub.card_file import NAME, make_card
from alignkd.pipeline.hub.card_text import licence_in
from alignkd.pipeline.hub.download import chosen_files
from alignkd.pipeline.hub.messages import explained
from alignkd.pipeline.hub.names import ModelName, parse_name
from alignkd.pipeline.hub.snapshots import WHOLE_MODEL, missing_files
from alignkd.pipeline.runtime.files import check_out_folder, replace_text
from alignkd.plain_files import read_plain

_log = logging.getLogger(__name__)
_CARD_BYTES = 2**20


@dataclass(frozen=True)
class Training:
    """The run that a student is of. ``best``: what says which student is the best, None where none was kept."""

    record: dict[str, Any]
    result: dict[str, Any] | None
    best: dict[str, Any] | None


def push(config: PushConfig, run: Training, scores: Sequence[CardScore]) -> dict[str, Any]:
    """Publish the student of a run, or write it to a folder; what was written and where.

    Raises:
        ConfigError: the repository is no ORG/NAME, or the folder is not empty.
        CheckpointError: there is no such student, or the Hub refuses.
        TransientError: the Hub is busy, or the connection broke.
    """
    name = None if config.repo is None else _repository(config.repo)
    student = _student(config, run)
    files = _published(student)
    _warn_of_other_models(Path(config.run), scores)
    licence = config.license or licence_in(_text_of(student / NAME))
    best = run.best if config.best else None
    result = None if config.best else run.result
    card = make_card(student, run.record, result=result, best=best, scores=scores, repo=config.repo, licence=licence).text()
    size = sum((student / file).stat().st_size for file in files)
    figures: dict[str, Any] = {"student": str(student), "files": len(files) + 1, "bytes": size + len(card.encode())}
    if config.folder is not None:
        figures["folder"] = _write(student, files, card, Path(config.folder))
    else:
        assert name is not None
        figures["url"] = _upload(student, files, card, name, config)
    return {**figures, "license": licence or "not stated: fill it in at the head of README.md"}


def _repository(repo: str) -> ModelName:
    name = parse_name(repo)
    if name is None or name.revision is not None:
        raise ConfigError(f"REPO is {repo!r}, expected ORG/NAME of the Hugging Face Hub; --revision names a branch")
    return name


def _student(config: PushConfig, run: Training) -> Path:
    out = Path(config.run)
    if config.best and run.best is None:
        raise CheckpointError(f"{out} holds no best student: alignkd distill keeps one with --keep-best; leave out --best")
    student = out / "best" / "student" if config.best else out / ("student-official" if config.official else "student")
    if not student.is_dir():
        why = (
            "its student has no layout of an official release; leave out --official"
            if config.official and (out / "student").is_dir()
            else "the best was kept as an adapter; merge it, or leave out --best"
            if config.best
            else "it is written when the run ends: continue it with alignkd distill --resume"
        )
        raise CheckpointError(f"{student} is not there: {why}")
    if missing := list(missing_files(student, WHOLE_MODEL)):
        raise CheckpointError(f"{student} is not whole: it lacks {', '.join(missing[:4])}; restore it, or end the run again")
    return student


def _published(student: Path) -> list[str]:
    """The files of a student's folder that are published: plain ones, that loading reads."""
    plain = [path for path in student.rglob("*") if path.is_file() and not path.is_symlink()]
    names = [path.relative_to(student).as_posix() for path in plain]
    small, weights = chosen_files(names)
    if left := sorted({*names} - {*small, *weights, NAME}):
        _log.warning(
            "%d files of %s are left out, as no model is loaded from them: %s", len(left), student, ", ".join(left[:4])
        )
    return [*small, *weights]


def _warn_of_other_models(run: Path, scores: Sequence[CardScore]) -> None:
    students = {(run / name).resolve() for name in ("student", "student-official", "best/student")}
    if other := sorted({score.of for score in scores if score.of and Path(score.of).resolve() not in students}):
        _log.warning("scores of the card were measured on %s, which is no student of %s", ", ".join(other[:4]), run)


def _write(student: Path, files: Sequence[str], card: str, folder: Path) -> str:
    check_out_folder(folder, "--folder")
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"--folder {folder} is not empty; choose a new folder")
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(student / file, folder / file)
    replace_text(folder / NAME, card)
    return str(folder)


def _upload(student: Path, files: Sequence[str], card: str, name: ModelName, config: PushConfig) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    api, adds = HfApi(), [CommitOperationAdd(file, student / file) for file in files]
    adds.append(CommitOperationAdd(NAME, card.encode()))
    try:
        with explained(name, "pushed to"):
            api.create_repo(name.repo, private=config.private or None, exist_ok=True)
            if config.revision is not None:
                api.create_branch(name.repo, branch=config.revision, exist_ok=True)
            done = api.create_commit(name.repo, adds, commit_message="A student of alignkd distill", revision=config.revision)
    except LocalTokenNotFoundError as error:
        raise ConfigError("no login for the Hugging Face Hub: run hf auth login, or set HF_TOKEN") from error
    return str(done.commit_url)


def _text_of(path: Path) -> str:
    try:
        return read_plain(path, _CARD_BYTES).decode()
    except (OSError, ValueError):
        return ""
