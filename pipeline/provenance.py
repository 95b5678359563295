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

_PACKAGES = ("alignkd", "torch", "transformers", "accelerate", "numpy", "zarr", "numcodecs", "sentencepiece", "pillow")


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


def write_run(path: Path, command: str, configuration: dict[str, Any]) -> None:
    """Write a run's record as JSON."""
    record = {
        "command": command,
        "arguments": sys.argv[1:],
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "configuration": configuration,
        "versions": versions(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2, default=str) + "\n")


def peak_memory_bytes() -> int:
    """Peak memory: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def pick_device(name: str | None) -> str:
    """The device asked for, or the GPU where there is one.

    Raises:
        ValueError: it is not here.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return name


def parse_dtype(name: str) -> torch.dtype:
    """A dtype by its command-line name."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
