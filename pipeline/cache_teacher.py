"""Stage one: run the teacher once and write its targets.

1. Index the data file and give every sample its key. 2. Load the teacher; everything that determines the targets becomes
the cache's fingerprint. 3. Freeze the plan, or refuse to go on with a cache that was written otherwise. 4. For each shard
that is not committed: prepare its samples, run batches under a token budget, commit it whole.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alignkd.batch import collate
from alignkd.cache_store.row import Rejected, Row
from alignkd.cache_store.spec import CacheSpec
from alignkd.cache_store.store import CacheStore
from alignkd.capture import enable_capture
from alignkd.models.loading import load_vlm
from alignkd.models.vlm import Vlm
from alignkd.pipeline.cache_figures import status_figures
from alignkd.pipeline.interrupt import StopFlag, stop_on_signals
from alignkd.pipeline.prepare import DEFAULT_MAX_LENGTH, Prepared, Preparer, SampleError
from alignkd.pipeline.progress import bar
from alignkd.pipeline.provenance import parse_dtype, peak_memory_bytes, pick_device, write_run
from alignkd.pipeline.rejects import Rejects
from alignkd.pipeline.samples import Sample, SampleFile
from alignkd.pipeline.targets_io import TargetSettings, teacher_values
from alignkd.prompts import TEMPLATES


@dataclass(frozen=True)
class CacheTeacherConfig:
    """What ``alignkd cache-teacher`` was asked to do. ``batch_tokens`` counts positions after padding."""

    teacher: str
    data: str
    images: str | None
    cache: str
    template: str | None = None
    max_length: int = DEFAULT_MAX_LENGTH
    settings: TargetSettings = field(default_factory=TargetSettings)
    shard_samples: int = 512
    batch_tokens: int = 16_384
    dtype: str = "float32"
    device: str | None = None
    vision_tower: str | None = None
    max_rejected: int = 100


@dataclass(frozen=True)
class Batchable:
    """A prepared sample with its length in positions."""

    sample: Sample
    prepared: Prepared
    length: int


def fingerprint(teacher: Vlm, template: str, config: CacheTeacherConfig, keys: np.ndarray) -> dict[str, Any]:
    """Everything that determines the targets; stage one refuses to go on, and stage two to read, under another."""
    return {
        "teacher": {
            "weights": teacher.weights_fingerprint(),
            "dtype": config.dtype,
            "vocabulary": teacher.vocabulary,
            "heads": teacher.heads,
            "width": teacher.hidden_size,
        },
        "tokenizer": teacher.tokenizer_fingerprint(),
        "template": template,
        "image_preprocessing": teacher.images.fingerprint(),
        "vision_tokens_per_image": teacher.vision_tokens_per_image,
        "max_length": config.max_length,
        "targets": config.settings.fingerprint(),
        "data": hashlib.sha256(keys.tobytes()).hexdigest(),
    }


@dataclass
class StageOne:
    """A loaded teacher and an indexed data file, ready to estimate or to write."""

    config: CacheTeacherConfig
    teacher: Vlm
    template: str
    samples: SampleFile
    order: np.ndarray

    @classmethod
    def open(cls, config: CacheTeacherConfig) -> "StageOne":
        """Read the data file, then the teacher.

        Raises:
            ValueError: either cannot be used.
        """
        samples = SampleFile(config.data)
        device = pick_device(config.device)
        tower = Path(config.vision_tower) if config.vision_tower else None
        teacher = load_vlm(config.teacher, dtype=parse_dtype(config.dtype), device=device, vision_tower=tower)
        enable_capture(teacher.model)
        teacher.model.requires_grad_(False)
        template = config.template or teacher.default_template
        if template not in TEMPLATES:
            raise ValueError(f"--template {template}: known are {', '.join(TEMPLATES)}")
        if config.settings.top_k > teacher.vocabulary:
            settings = replace(config.settings, top_k=teacher.vocabulary)
            config = replace(config, settings=settings)
        return cls(config, teacher, template, samples, samples.unique())

    @property
    def preparer(self) -> Preparer:
        """How samples become inputs of this teacher."""
        config = self.config
        return Preparer.of(self.teacher, template=self.template, max_length=config.max_length, image_root=config.images)

    def spec(self) -> CacheSpec:
        """The cache's fields and fingerprint."""
        keys = self.samples.keys[self.order]
        fields = self.config.settings.fields(self.teacher.vocabulary)
        return CacheSpec(fields, fingerprint(self.teacher, self.template, self.config, keys))

    def prepare(self, indices: Sequence[int], rejects: Rejects) -> tuple[list[Batchable], list[Rejected]]:
        """Prepare samples; those that cannot be are named and counted."""
        ready, rejected, preparer = [], [], self.preparer
        for index in indices:
            sample = self.samples[index]
            try:
                prepared = preparer(sample)
            except SampleError as error:
                rejects.add(sample.id or sample.key, str(error))
                rejected.append(Rejected(sample.key, sample.id, str(error)))
                continue
            length = len(prepared.input.input_ids) + len(sample.images) * (self.teacher.vision_tokens_per_image - 1)
            ready.append(Batchable(sample, prepared, length))
        return ready, rejected

    def run(self, batch: Sequence[Batchable]) -> list[Row]:
        """One forward pass of the teacher; the rows of its samples."""
        inputs = [item.prepared.input for item in batch]
        collated = collate(
            inputs,
            vision_tokens_per_image=self.teacher.vision_tokens_per_image,
            pad_token_id=self.teacher.tokenizer.pad_token_id,
        )
        values = teacher_values(self.teacher, collated.to(self.teacher.device), inputs, self.config.settings)
        return [
            Row(item.sample.key, item.sample.id, item.prepared.image_sha256, value)
            for item, value in zip(batch, values, strict=True)
        ]


def batches(items: Sequence[Batchable], batch_tokens: int) -> Iterator[list[Batchable]]:
    """Group by length under a budget of padded positions, longest first; a pure function of the items."""
    current: list[Batchable] = []
    for item in sorted(items, key=lambda item: (-item.length, item.sample.key)):
        if current and (len(current) + 1) * current[0].length > batch_tokens:
            yield current
            current = []
        current.append(item)
    if current:
        yield current


def cache_teacher(config: CacheTeacherConfig) -> dict[str, Any]:
    """Write (or go on with) a cache; figures of this run and of the whole cache.

    Raises:
        ValueError: bad input, a cache of other settings, or too many rejected samples.
        Interrupted: a signal came; what is committed stays.
    """
    with stop_on_signals() as stop:
        return _cache_teacher(config, stop)


def _cache_teacher(config: CacheTeacherConfig, stop: StopFlag) -> dict[str, Any]:
    stage = StageOne.open(config)
    keys = stage.samples.keys[stage.order]
    meta = {"data_file": Path(config.data).name, "records": len(stage.samples)}
    store = CacheStore.create_or_open(config.cache, stage.spec(), keys, shard_samples=config.shard_samples, plan_meta=meta)
    store.sweep()
    write_run(Path(config.cache) / "run.json", "cache-teacher", asdict(stage.config) | {"template": stage.template})
    before = store.status()
    rejects = Rejects(config.max_rejected)
    for sample in before.rejected:
        rejects.add(sample.sample_id or sample.key, sample.reason)
    done = before.samples_done + before.samples_rejected
    started, new_samples = time.perf_counter(), 0
    stop.check()
    with bar("cache-teacher", before.samples, "samples", done=done) as progress:
        for shard in store.pending():
            shard_started = time.perf_counter()
            indices = stage.order[shard * config.shard_samples : (shard + 1) * config.shard_samples]
            ready, rejected = stage.prepare(indices.tolist(), rejects)
            progress.advance(len(rejected))
            rows: list[Row] = []
            for batch in batches(ready, config.batch_tokens):
                stop.check()
                rows += stage.run(batch)
                progress.advance(len(batch))
            tokens = sum(item.length for item in ready)
            store.commit_shard(shard, rows, rejected, seconds=time.perf_counter() - shard_started, tokens=tokens)
            new_samples += len(rows)
            progress.note(f"{rejects.count} rejected" if rejects.count else "")
    seconds = time.perf_counter() - started
    return {
        "new_samples": new_samples,
        "seconds": round(seconds, 3),
        "samples_per_second": round(new_samples / seconds, 3) if new_samples else 0.0,
        "peak_memory_bytes": peak_memory_bytes(),
        **status_figures(store),
    }


def dry_run(config: CacheTeacherConfig, probe: int = 32) -> dict[str, Any]:
    """Plan, size and time, estimated from real samples spread over the data; nothing is written."""
    from alignkd.cache_store.zarr_shard import write_shard

    stage = StageOne.open(config)
    total = len(stage.order)
    chosen = stage.order[np.linspace(0, total - 1, min(probe, total)).astype(int)]
    rejects = Rejects(config.max_rejected)
    ready, rejected = stage.prepare(chosen.tolist(), rejects)
    if not ready:
        raise ValueError(
            f"none of {len(chosen)} samples tried can be used. First: {rejected[0].sample_id}: {rejected[0].reason}"
        )
    started = time.perf_counter()
    rows = [row for batch in batches(ready, config.batch_tokens) for row in stage.run(batch)]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / len(rows)
    size = len(write_shard(stage.spec(), rows)) / len(rows)
    return {
        "samples": total,
        "records": len(stage.samples),
        "shards": -(-total // config.shard_samples),
        "template": stage.template,
        "tried": len(chosen),
        "rejected_of_tried": len(rejected),
        "positions_per_sample": round(float(np.mean([item.length for item in ready])), 1),
        "bytes_per_sample": round(size),
        "bytes": round(size * total),
        "seconds_per_sample": round(seconds, 6),
        "hours": round(seconds * total / 3600, 4),
    }
