"""The local Hugging Face cache: which commit of a model it holds, and whether that is whole. Nothing is downloaded here.

Its layout: ``models--ORG--NAME/refs/REVISION`` holds a commit, ``snapshots/COMMIT/`` the files, as links to ``blobs/``.
Source: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from alignkd.errors import AlignkdError
from alignkd.models.config_files import read_json
from alignkd.pipeline.hub.names import ModelName, is_commit
from alignkd.plain_files import read_plain

_SINGLE = ("model.safetensors", "pytorch_model.bin")
_INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_REF_BYTES = 256


@dataclass(frozen=True)
class Needs:
    """The files without which a model cannot be used, besides its ``config.json``."""

    weights: bool = True
    tokenizer: bool = True


WHOLE_MODEL = Needs()
TOWER = Needs(tokenizer=False)
TOWER_SETTINGS = Needs(weights=False, tokenizer=False)
"""Of a tower whose weights the checkpoint may hold itself."""


@dataclass(frozen=True)
class Snapshot:
    """A commit of a model in the cache. ``missing``: the needed files that it lacks."""

    name: ModelName
    folder: Path
    missing: tuple[str, ...]


def cache_folder() -> Path:
    """The local Hugging Face cache; the environment variables HF_HUB_CACHE and HF_HOME set it."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def repo_folder(repo: str) -> Path:
    """Where the cache keeps a repository."""
    return cache_folder() / f"models--{repo.replace('/', '--')}"


def find_snapshot(name: ModelName, needs: Needs = WHOLE_MODEL) -> Snapshot | None:
    """What the cache holds of a model at the revision asked for; None where it holds nothing."""
    kept = repo_folder(name.repo)
    commit = name.asked if name.is_pinned else _commit_of(kept / "refs" / name.asked)
    if commit is None or not (kept / "snapshots" / commit).is_dir():
        return None
    folder = kept / "snapshots" / commit
    return Snapshot(name.at(commit), folder, tuple(missing_files(folder, needs)))


def cached_commits(repo: str) -> list[str]:
    """All commits of a repository that the cache holds something of."""
    folder = repo_folder(repo) / "snapshots"
    return sorted(path.name for path in folder.iterdir() if is_commit(path.name)) if folder.is_dir() else []


def missing_files(folder: Path, needs: Needs) -> Iterator[str]:
    """The needed files that a snapshot lacks; a link to bytes that are not there is none."""
    if not (folder / "config.json").is_file():
        yield "config.json"
    links = (path for path in folder.rglob("*") if path.is_symlink() and not path.exists())
    broken = {str(path.relative_to(folder)) for path in links}
    yield from sorted(broken - {"config.json"})
    if needs.weights and not broken & {*_SINGLE, *_INDEX}:
        yield from (name for name in _missing_weights(folder) if name not in broken)
    if needs.tokenizer and not any((folder / name).is_file() for name in _TOKENIZERS) and not broken & {*_TOKENIZERS}:
        yield "tokenizer.json or tokenizer.model"


def _missing_weights(folder: Path) -> list[str]:
    if any((folder / name).is_file() for name in _SINGLE):
        return []
    for name in _INDEX:
        if (folder / name).is_file():
            try:
                named = read_json(folder / name).get("weight_map")
            except AlignkdError:
                return []  # the loader says what is wrong with it
            shards = {str(shard) for shard in named.values()} if isinstance(named, dict) else set()
            return sorted(shard for shard in shards if not (folder / shard).is_file())
    return [f"{_SINGLE[0]} (or its shards, or {_SINGLE[1]})"]


def _commit_of(ref: Path) -> str | None:
    try:
        found = read_plain(ref, _REF_BYTES).decode().strip()
    except (OSError, ValueError):
        return None
    return found if is_commit(found) else None
