"""What a user is told when a model is not here, or the Hub does not give it."""

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager

from alignkd.errors import AlignkdError, CheckpointError, TransientError
from alignkd.pipeline.hub.names import ModelName
from alignkd.pipeline.hub.snapshots import Snapshot, cache_folder, cached_commits, repo_folder

_SHOWN = 4
_GATE, _BUSY = (401, 403), (408, 429)


def endpoint() -> str:
    """The address of the Hub; the environment variable HF_ENDPOINT sets it."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def elsewhere(name: ModelName) -> str:
    """How to bring a model here from a machine that has network."""
    command = shlex.join(["hf", "download", name.repo, "--revision", name.asked, "--local-dir", name.last])
    return (
        f"Without network here, run on a machine that has it:  {command}  then copy the folder {name.last} to this machine and"
        f" give its path in place of the name (or copy {repo_folder(name.repo).name} from that machine's cache into"
        f" {cache_folder()})"
    )


def not_here(name: ModelName) -> CheckpointError:
    """No folder has the name, and the cache does not hold the model."""
    commits = cached_commits(name.repo)
    held = ", ".join(f"{name.repo}@{commit}" for commit in commits[:_SHOWN])
    other = f" (it holds {held}: give one of these to use it)" if held else ""
    return CheckpointError(
        f"{name} is not a folder, and the local Hugging Face cache {cache_folder()} does not hold it{other}. If it is a path,"
        f" correct it; if it is a model, add --download to fetch it from {endpoint()}. {elsewhere(name)}"
    )


def incomplete(found: Snapshot) -> CheckpointError:
    """The cache holds a part of the model."""
    shown = ", ".join(found.missing[:_SHOWN]) + (f" and {len(found.missing) - _SHOWN} more" * (len(found.missing) > _SHOWN))
    return CheckpointError(
        f"{found.name} in the local Hugging Face cache is not complete: {found.folder} lacks {shown}. Add --download to fetch"
        f" what is missing. {elsewhere(found.name)}"
    )


@contextmanager
def explained(name: ModelName, doing: str = "downloaded") -> Iterator[None]:
    """Turn what huggingface_hub raises into one message.

    Raises:
        CheckpointError: the Hub refuses, does not know the model, or cannot be reached.
        TransientError: the Hub is busy, or the connection broke; what was fetched whole is kept.
    """
    try:
        yield
    except Exception as error:
        if (told := _explanation(name, doing, error)) is None:
            raise
        raise told from error


def _explanation(name: ModelName, doing: str, error: Exception) -> AlignkdError | None:
    from huggingface_hub import errors

    if isinstance(error, AlignkdError | MemoryError):
        return None
    address = f"{endpoint()}/{name.repo}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return CheckpointError(
            f"{name} cannot be {doing}: the environment variable HF_HUB_OFFLINE is set. Unset it. {elsewhere(name)}"
        )
    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(
            f"{name} is gated: accept its terms at {address} with your account, then log in here: hf auth login (or set"
            " HF_TOKEN)"
        )
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointError(f"{name.repo} has no revision {name.asked!r}; {address}/tree/main lists branches and tags")
    if isinstance(error, errors.RepositoryNotFoundError) or status in _GATE:
        return CheckpointError(
            f"{address} does not exist, or is private and this login may not use it (HTTP {status}): correct the name, or"
            " log in: hf auth login (or set HF_TOKEN)"
        )
    if isinstance(error, errors.HfHubHTTPError):
        busy = status in _BUSY or (status or 0) >= 500
        words = f"{name} cannot be {doing}: {endpoint()} answered HTTP {status}"
        return TransientError(f"{words}; run the same command again") if busy else CheckpointError(f"{words} ({_short(error)})")
    if isinstance(error, errors.LocalEntryNotFoundError) or _is_no_connection(error):
        return CheckpointError(f"{name} cannot be {doing}: {endpoint()} cannot be reached ({_short(error)}). {elsewhere(name)}")
    if _is_of_httpx(error) or (isinstance(error, OSError) and error.errno is None):  # else it is the disk's
        return TransientError(
            f"{name}: the connection to {endpoint()} broke ({_short(error)}); files that were sent whole are kept: run the same"
            " command again"
        )
    return None


def _is_of_httpx(error: BaseException) -> bool:
    """Whether the HTTP library raised it; which one huggingface_hub uses depends on its version."""
    return type(error).__module__.partition(".")[0].startswith("httpx")


def _is_no_connection(error: BaseException) -> bool:
    return _is_of_httpx(error) and type(error).__name__ in ("ConnectError", "ConnectTimeout", "ProxyError")


def _short(error: BaseException) -> str:
    return " ".join(str(error).replace(os.linesep, " ").split())[:200]
