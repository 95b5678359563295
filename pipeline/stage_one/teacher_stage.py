"""What stage one works with: the indexed data, the teacher, the plan, and one batch at a time.

Shapes: see ``alignkd.inputs.batch``.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from alignkd.cache_store.protocol.plan import Plan
from alignkd.cache_store.protocol.store import CacheStore
from alignkd.cache_store.rows.row import Rejected
from alignkd.cache_store.rows.spec import CacheSpec
from alignkd.capture.attention import enable_capture
from alignkd.capture.teacher_slice import check_sliceable
from alignkd.errors import SampleError
from alignkd.inputs.batch import Batch, collate
from alignkd.inputs.prompts import check_template
from alignkd.losses.layers import find_teacher_layers
from alignkd.models.loading import load_vlm
from alignkd.models.vlm import Vlm
from alignkd.pipeline.cache_io.logits import clamped_to_teacher, logit_arrays, open_codec
from alignkd.pipeline.cache_io.targets import row_fields
from alignkd.pipeline.cache_io.teacher_fingerprint import describe_teacher
from alignkd.pipeline.cache_io.teacher_slice import check_alignment, slice_arrays, slice_fingerprint
from alignkd.pipeline.config.cache_layout import SLICED
from alignkd.pipeline.config.cache_teacher import CacheTeacherConfig
from alignkd.pipeline.config.targets import TargetSettings
from alignkd.pipeline.data.preparer import Prepared, Preparer
from alignkd.pipeline.data.samples import SampleFile
from alignkd.pipeline.runtime.devices import parse_dtype, pick_device
from alignkd.pipeline.runtime.progress import progress_bar
from alignkd.pipeline.runtime.signals import StopFlag
from alignkd.pipeline.stage_one.calibrate import CALIBRATION_POSITIONS, CALIBRATION_SAMPLES, calibrate
from alignkd.pipeline.stage_one.planned_samples import find_samples
from alignkd.pipeline.stage_one.run_teacher import TeacherOutput, run_teacher
from alignkd.pipeline.stage_one.shard_work import PlannedSample, ReadyBatch, ShardWork, batches
from alignkd.targets.logits import LogitCodec


@dataclass
class StageOne:
    """A loaded teacher and an indexed data file, ready to estimate or to write."""

    config: CacheTeacherConfig
    teacher: Vlm
    template: str
    samples: SampleFile
    plan: Plan
    stop: StopFlag = field(default_factory=StopFlag)
    logit_codec: LogitCodec | None = None

    @classmethod
    def open(cls, config: CacheTeacherConfig, local_rank: int = 0, stop: StopFlag | None = None) -> "StageOne":
        """Read the data file (or the plan that a run before left), then the teacher. ``stop`` ends a calibration early.

        Raises:
            ValueError: either cannot be used.
        """
        check_alignment(config.alignment, set(config.settings.targets), without_tower=config.slice_without_tower)
        samples, plan = find_samples(config)
        tower = Path(config.vision_tower) if config.vision_tower else None
        device = pick_device(config.device, local_rank)
        teacher = load_vlm(config.teacher, dtype=parse_dtype(config.dtype), device=device, vision_tower=tower)
        enable_capture(teacher)
        teacher.model.requires_grad_(False)
        if config.alignment == "slice":
            check_sliceable(teacher)
        if config.settings.logits.vocabulary is not None and "logits" not in config.settings.targets:
            raise ValueError(f"--logit-vocabulary {config.settings.logits.vocabulary} needs logits among --targets")
        template = config.template or teacher.default_template
        check_template(template, teacher.templates)
        logits = clamped_to_teacher(config.settings.logits, teacher.vocabulary, teacher.hidden_size)
        layers = _attention_layers(config, teacher.layers)
        settings = replace(config.settings, logits=logits, attention_layers=layers, layers=teacher.layers)
        config = replace(config, settings=settings)
        return cls(config, teacher, template, samples, plan, StopFlag() if stop is None else stop)

    @cached_property
    def preparer(self) -> Preparer:
        """How samples become inputs of this teacher."""
        config = self.config
        return Preparer.of(
            self.teacher,
            template=self.template,
            max_length=config.max_length,
            image_root=config.images,
            with_spans=self.row_settings.across,
        )

    @cached_property
    def row_settings(self) -> TargetSettings:
        """The targets that rows hold: those that no slice gives. A slice serves students of the teacher's make alone."""
        settings = self.config.settings
        if self.config.alignment == "targets":
            return settings
        return replace(settings, targets=tuple(name for name in settings.targets if name not in SLICED), across=False)

    def spec(self) -> CacheSpec:
        """The cache's fields and fingerprint."""
        return CacheSpec(row_fields(self.row_settings, self.teacher.vocabulary), self.fingerprint())

    def fingerprint(self) -> dict[str, Any]:
        """Everything that determines the targets; stage one refuses to go on, and stage two to read, under another."""
        teacher, config = self.teacher, self.config
        return {
            **describe_teacher(teacher, self.template),
            "teacher": {"weights": self._weights, "dtype": config.dtype, **describe_teacher(teacher, self.template)["teacher"]},
            "max_length": config.max_length,
            "targets": config.settings.fingerprint(),
            "alignment": config.alignment,
            **self._slice,
            **self._first_ids,
            "data": hashlib.sha256(self.plan.keys.tobytes()).hexdigest(),
        }

    @property
    def _first_ids(self) -> dict[str, str]:
        """What a student's tokenizer is compared with where distributions are over the first ids alone."""
        limit = self.config.settings.logits.vocabulary
        return {} if limit is None else {"tokenizer_first_ids": self.teacher.tokenizer_fingerprint(limit)}

    @cached_property
    def _slice(self) -> dict[str, Any]:
        if self.config.alignment == "targets":
            return {}
        return {"slice": slice_fingerprint(self.teacher, tower=not self.config.slice_without_tower)}

    def tensors(self) -> dict[str, np.ndarray]:
        """What the cache keeps once for all rows; made when the cache is started, and never again."""
        sliced = self.config.alignment == "slice"
        arrays = slice_arrays(self.teacher, tower=not self.config.slice_without_tower) if sliced else {}
        if "logits" in self.row_settings.targets:
            logits = self.row_settings.logits
            arrays |= logit_arrays(logits, calibrate(self.teacher, self._calibration_batches(), logits.vocabulary))
        return arrays

    def _calibration_batches(self) -> Iterator[Batch]:
        """Samples spread over the data; those that cannot be used are left out here and named later, in their shards."""
        chosen = np.linspace(0, self.plan.samples - 1, min(CALIBRATION_SAMPLES, self.plan.samples)).astype(int).tolist()
        work = self.lay_out_samples(0, chosen)
        items = [item for batch in work.batches for item in batch]
        parts = list(batches(items, min(self.config.batch_tokens, CALIBRATION_POSITIONS)))
        with progress_bar("calibrate", len(parts), "batches") as progress:
            for items in parts:
                self.stop.check()
                batch = self.load(items).batch
                if batch is not None:
                    yield batch
                progress.advance()

    def use_tensors(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Encode logits with what the cache keeps once (:meth:`tensors`, or the cache's own)."""
        if "logits" in self.row_settings.targets:
            self.logit_codec = open_codec(self.row_settings.logits, arrays, self.teacher.device)

    @cached_property
    def _weights(self) -> str:
        return self.teacher.weights_fingerprint()

    def open_store(self) -> CacheStore:
        """Start the cache, or go on with it.

        Raises:
            ValueError: it was written with other settings.
        """
        store = CacheStore.create_or_open(
            self.config.cache, self.spec(), self.plan, shard_format=self.config.shard_format, tensors=self.tensors
        )
        self.use_tensors(store.tensors)
        return store

    def lay_out(self, shard: int) -> ShardWork:
        """Prepare the texts of a planned shard and group them into batches."""
        return self.lay_out_samples(shard, self.plan.positions_of(shard))

    def lay_out_samples(self, number: int, positions: Sequence[int]) -> ShardWork:
        """As :meth:`lay_out`, for any places of the plan."""
        items, rejected = [], []
        for position in positions:
            sample = self.samples[position]
            try:
                text = self.preparer.text(sample)
            except SampleError as error:
                rejected.append(Rejected(sample.key, sample.id, str(error)))
                continue
            items.append(PlannedSample(sample, text))
        return ShardWork(number, list(batches(items, self.config.batch_tokens)), rejected)

    def load(self, items: Sequence[PlannedSample]) -> ReadyBatch:
        """Read the images of a batch and collate it, page-locked where a GPU will fetch it."""
        ready, rejected = [], []
        for item in items:
            try:
                prepared = self.preparer.with_images(item.sample, item.text)
                self._check_answers(prepared)
                ready.append((item, prepared))
            except SampleError as error:
                rejected.append(Rejected(item.sample.key, item.sample.id, str(error)))
        return ReadyBatch(ready, self.collate(ready) if ready else None, rejected)

    def _check_answers(self, prepared: Prepared) -> None:
        """Refuse an answer with a token that the cached distributions leave out.

        Raises:
            SampleError: names the token.
        """
        limit = self.config.settings.logits.vocabulary
        beyond = [] if limit is None else prepared.input.labels[prepared.input.labels >= limit].tolist()
        if beyond:
            token = self.teacher.tokenizer.convert_ids_to_tokens(beyond[0])
            raise SampleError(
                f"its answer holds {token!r}, id {beyond[0]}: --logit-vocabulary {limit} keeps the ids below alone"
            )

    def collate(self, ready: Sequence[tuple[PlannedSample, Prepared]]) -> Batch:
        """Pad inputs into one batch on the host."""
        batch = collate(
            [prepared.input for _, prepared in ready],
            tokens_per_placeholder=self.teacher.tokens_per_placeholder,
            pad_token_id=self.teacher.pad_token_id,
            image_token_id=self.teacher.image_token_id,
        )
        return batch.pin_memory() if self.teacher.device.type == "cuda" else batch

    def run(self, ready: ReadyBatch) -> TeacherOutput:
        """One forward pass of the teacher."""
        assert ready.batch is not None
        keys = [item.sample.key for item, _ in ready.items]
        return run_teacher(self.teacher, ready.batch, ready.inputs, self.row_settings, self.logit_codec, keys)


def _attention_layers(config: CacheTeacherConfig, depth: int) -> tuple[int, ...]:
    """The teacher's layers whose attention is cached.

    Raises:
        ValueError: it has no such layers, or they cannot be cached under the other options.
    """
    try:
        layers = find_teacher_layers(config.attention_layers, depth)
    except ValueError as error:
        raise ValueError(f"--attention-layers: {error}") from error
    if layers != (0,) and config.alignment == "slice":
        raise ValueError(
            f"--alignment slice gives the attention of the first layer alone, not of --attention-layers"
            f" {config.attention_layers}: all layers before would have to be kept. Use --alignment targets"
        )
    if layers != (0,) and "attention" not in config.settings.targets:
        raise ValueError(f"--attention-layers {config.attention_layers} needs attention among --targets")
    return layers
