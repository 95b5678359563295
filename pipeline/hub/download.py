"""Fetch a model from the Hub into the local Hugging Face cache: the files that loading reads, and no others.

Small files first and weights last, so that a snapshot with its weights has everything. Several processes may fetch the same
model: huggingface_hub locks each file, and who comes second finds it. A broken connection goes on where it broke; after a
kill, files that were fetched whole are kept.
"""

import logging
import re
from collections.abc import Iterable
from pathlib import Path

from alignkd.errors import CheckpointError
from alignkd.pipeline.hub.messages import explained
from alignkd.pipeline.hub.names import ModelName

_log = logging.getLogger(__name__)

SMALL = re.compile(
    r"[\w.+-]+\.(json|jinja|txt|model|tiktoken)|clip/[\w.-]+\.json|additional_chat_templates/[\w.-]+\.jinja", re.ASCII
)
"""Configuration, tokenizer, preprocessing and templates. Python files are never fetched, and nothing of a folder but these."""
SAFETENSORS = re.compile(r"(clip/)?model[\w.-]*\.safetensors", re.ASCII)
PICKLED = re.compile(r"(clip/)?pytorch_model[\w.-]*\.bin", re.ASCII)
"""Fetched where there are no safetensors; they are read as tensors alone, and nothing else in them is unpickled."""

_TRIES = 3


def chosen_files(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """The small files of a repository that are fetched, and the weights."""
    listed = sorted(names)
    weights = list[str]()
    for tower in (False, True):
        here = [name for name in listed if name.startswith("clip/") == tower]
        safe = [name for name in here if SAFETENSORS.fullmatch(name)]
        weights += safe or [name for name in here if PICKLED.fullmatch(name)]
    return [name for name in listed if SMALL.fullmatch(name)], weights


def download(name: ModelName) -> ModelName:
    """Fetch what the cache lacks of a model; the name with the commit that it is.

    Raises:
        CheckpointError: the Hub refuses, does not know the model or cannot be reached, or the model has no weights.
        TransientError: the Hub is busy, or the connection broke.
    """
    from huggingface_hub import HfApi, snapshot_download

    with explained(name):
        for _ in range(_TRIES):
            info = HfApi().model_info(name.repo, revision=name.asked, files_metadata=True)
            sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
            small, weights = chosen_files(sizes)
            if "config.json" not in small or not any("/" not in file for file in weights):
                raise CheckpointError(
                    f"{name} holds no {'weights' if 'config.json' in small else 'config.json'} that alignkd reads: expected"
                    " config.json and model*.safetensors or pytorch_model*.bin; is it a model that transformers loads?"
                )
            size = sum(sizes[file] for file in (*small, *weights))
            _log.info("%s: fetching %d files, %.3g GB, commit %s", name, len(small) + len(weights), size / 1e9, info.sha)
            # With the revision, so that the cache knows it by that name too. It may have moved since the listing.
            commit = Path(snapshot_download(name.repo, revision=name.asked, allow_patterns=small)).name
            if commit == info.sha:
                break
        snapshot_download(name.repo, revision=commit, allow_patterns=weights)
    _log.info("%s is in the local Hugging Face cache: commit %s", name.repo, commit)
    return name.at(commit)
