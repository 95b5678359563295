"""Tiny data files, checkpoints and jobs that the tests of this folder share."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from alignkd.cache_store.protocol.maintenance.verify import verify
from alignkd.losses.recipes import get_recipe
from alignkd.pipeline.config.cache_teacher import CacheTeacherConfig
from alignkd.pipeline.config.distill import DistillConfig
from alignkd.pipeline.stage_one.worker import cache_teacher
from alignkd.pipeline.training.run import distill

GOLDEN = Path(__file__).parents[1] / "data" / "mobilevlm_v2_tiny"
IMAGES = GOLDEN / "images"
TEACHER, STUDENT = GOLDEN / "teacher", GOLDEN / "student"


def record(sample_id: str, image: Any, *texts: str) -> dict[str, Any]:
    """A LLaVA record; ``texts`` alternate between human and gpt; no image where ``image`` is None."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": sample_id, **({} if image is None else {"image": image}), "conversations": turns}


GOLDEN_SAMPLES = json.loads((GOLDEN / "samples.json").read_text())
TEXT_ONLY = record("text4", None, "What is two and two?", "Four.")
TWO_IMAGES = record("two5", ["0.png", "3.png"], "<image>\n<image>\nWhich is wide?", "The second one.")
SAMPLES = [*GOLDEN_SAMPLES, TEXT_ONLY, TWO_IMAGES]


def numbered(count: int) -> list[dict[str, Any]]:
    """As many samples as wanted, every third with an image: those take most of the time."""
    return [{**(TEXT_ONLY if i % 3 else GOLDEN_SAMPLES[i % 4]), "id": f"s{i}"} for i in range(count)]


def write_data(path: Path, records: list[dict[str, Any]], indent: int | None = None) -> Path:
    path.write_text(json.dumps(records, indent=indent))
    return path


def copy_checkpoint(source: Path, folder: Path, **config: Any) -> Path:
    """A golden checkpoint in another folder, its tower beside it, with fields of ``config.json`` changed."""
    shutil.copytree(source, folder)
    shutil.copytree(GOLDEN / "clip", folder / "clip")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "mm_vision_tower": "./clip", **config}))
    return folder


def with_vocabulary(source: Path, folder: Path, size: int) -> Path:
    """A golden checkpoint with more rows in its embedding and output head."""
    copy_checkpoint(source, folder, vocab_size=size)
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        extra = torch.zeros(size - len(state[name]), state[name].shape[1])
        state[name] = torch.cat([state[name], extra])
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def with_file(source: Path, folder: Path, name: str, **changes: Any) -> Path:
    """A golden checkpoint with fields of one of its JSON files changed."""
    copy_checkpoint(source, folder)
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def with_other_weights(source: Path, folder: Path) -> Path:
    """A golden checkpoint with one number of its output head changed."""
    copy_checkpoint(source, folder)
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    state["lm_head.weight"][0, 0] += 1
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def stage_one_config(data: Path, cache: Path, **changes: Any) -> CacheTeacherConfig:
    defaults = {"teacher": str(TEACHER), "images": str(IMAGES), "shard_samples": 2, "device": "cpu"}
    return CacheTeacherConfig(**{**defaults, "data": str(data), "cache": str(cache), **changes})


def write_cache(data: Path, cache: Path, **changes: Any) -> dict[str, Any]:
    return cache_teacher(stage_one_config(data, cache, **changes))


def content(cache: Path) -> str:
    report = verify(cache)
    assert report.problems == []
    return report.content_sha256


def run_record(cache: Path) -> dict[str, Any]:
    """What the one run that wrote a cache was asked to do."""
    (path,) = (cache / "runs").glob("*.json")
    return json.loads(path.read_text())


def stage_two_config(
    data: Path, cache: Path | None, out: Path, *, recipe: str = "align-kd", overrides: Any = None, **changes: Any
) -> DistillConfig:
    """Four epochs of six samples in batches of two: twelve steps."""
    defaults = {"student": str(STUDENT), "images": str(IMAGES), "epochs": 4.0, "batch_size": 2, "device": "cpu", "workers": 0}
    defaults |= {"learning_rate": 1e-3, "log_steps": 1, "recipe": get_recipe(recipe, overrides)}
    return DistillConfig(**{**defaults, "data": str(data), "out": str(out), "cache": str(cache) if cache else None, **changes})


def train(data: Path, cache: Path | None, out: Path, **changes: Any) -> dict[str, Any]:
    return distill(stage_two_config(data, cache, out, **changes))


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


TIMED = ("seconds", "tokens_per_second", "samples_per_second", "data_wait_share", "peak_memory_bytes")


def without_time(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMED} for line in lines]


def student_sha256(out: Path) -> str:
    return hashlib.sha256((out / "student" / "model.safetensors").read_bytes()).hexdigest()


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Poll often: what is waited for may last a few milliseconds only."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
