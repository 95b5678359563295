"""What ran: resolved configuration and versions, written beside every output."""

import json
import platform
import resource
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "alignkd",
    "torch",
    "transformers",
    "accelerate",
    "numpy",
    "zarr",
    "numcodecs",
    "webdataset",
    "fsspec",
    "sentencepiece",
    "pillow",
)


def versions() -> dict[str, str]:
    """Versions of Python, the platform and the packages that decide results."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return found


def run_record(command: str, configuration: dict[str, Any]) -> dict[str, Any]:
    """What a run was asked to do, when, and with which versions."""
    return {
        "command": command,
        "arguments": sys.argv[1:],
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "configuration": configuration,
        "versions": versions(),
    }


def write_run(path: Path, command: str, configuration: dict[str, Any]) -> None:
    """Write a run's record as JSON."""
    record = run_record(command, configuration)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2, default=str) + "\n")


def peak_memory_bytes() -> int:
    """Peak memory: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def pick_device(name: str | None, local_rank: int = 0) -> str:
    """The device asked for; else the GPU where there is one, and where there are several the local rank's own.

    Raises:
        ValueError: it is not here.
    """
    if name is None:
        if not torch.cuda.is_available():
            return "cpu"
        count = torch.cuda.device_count()
        return "cuda" if count == 1 else f"cuda:{local_rank % count}"
    try:
        torch.empty(0, device=name)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return name


def parse_dtype(name: str) -> torch.dtype:
    """A dtype by its command-line name."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
