"""What ran: the resolved configuration and the versions that decide results, written beside every output."""

import json
import platform
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from alignkd.pipeline.runtime.files import replace_text
from alignkd.pipeline.runtime.redact import redacted
from alignkd.plugins import loaded_plugins

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


def collect_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results; the platform and the device. Imports torch."""
    import torch  # only here: the device's name is all that is asked of it

    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return found


def make_run_record(command: str, configuration: dict[str, Any]) -> dict[str, Any]:
    """What a run was asked to do, when, and with which plugins and versions; credentials are removed."""
    record = {
        "command": command,
        "arguments": sys.argv[1:],
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "configuration": configuration,
        "plugins": [asdict(plugin) for plugin in loaded_plugins()],
        "versions": collect_versions(),
    }
    return dict(redacted(record))


def write_run_record(path: Path, command: str, configuration: dict[str, Any]) -> None:
    """Write a run's record as JSON; a kill leaves the file of before, or the new one, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(make_run_record(command, configuration), indent=2, default=str) + "\n")
