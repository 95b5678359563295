"""What ran: resolved configuration and versions, written beside every output."""

import json
import platform
import sys
from datetime import UTC, datetime
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
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "configuration": configuration,
        "versions": versions(),
    }


def write_run(path: Path, command: str, configuration: dict[str, Any]) -> None:
    """Write a run's record as JSON."""
    record = run_record(command, configuration)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2, default=str) + "\n")
