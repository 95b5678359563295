"""Whether a run may be started in a folder, or resumed with these settings."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def check_out(out: Path, *, resume: bool) -> None:
    """Refuse to write over a run.

    Raises:
        ValueError: there is one.
    """
    if not resume and (out / "metrics.jsonl").exists():
        raise ValueError(f"--out {out} already holds a run; go on with --resume, or choose another folder")


_MAY_CHANGE = (
    *("resume", "device", "workers", "save_steps", "save_total_limit", "log_steps", "max_rejected", "out", "images", "data"),
    *("cache", "report_to", "term_gradients", "feature_bytes", "batch_size", "gradient_accumulation", "batch_tokens"),
)
"""What a resumed run may be given anew: nothing that changes what is learned. Data and cache are compared by content, and
batches by what a step takes."""


def check_same_run(path: Path, resolved: Mapping[str, Any]) -> None:
    """Refuse to go on with a run of other settings. ``path``: its record; ``resolved``: the configuration now.

    Raises:
        ValueError: names each setting that differs, with both values.
    """
    if not path.is_file():
        return
    before = json.loads(path.read_text())["configuration"]
    now = json.loads(json.dumps(resolved, default=str))
    differing = [
        f"{name}: {before.get(name)!r} before, {value!r} now"
        for name, value in now.items()
        if name not in _MAY_CHANGE and before.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"--resume: {path.parent} was run with other settings: {'; '.join(differing)}. Resume with the same ones, or"
            " choose another --out"
        )
