"""What stage one works with: the indexed data, the teacher, the plan, and one batch at a time."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from alignkd.cache_store.errors import FingerprintMismatchError
from alignkd.cache_store.protocol.plan import Plan
from alignkd.cache_store.protocol.store import CacheStore
from alignkd.cache_store.rows.row import Rejected
from alignkd.cache_store.rows.spec import CacheSpec
from alignkd.capture.attention import enable_capture
from alignkd.errors import SampleError
from alignkd.inputs.batch import Batch
from alignkd.inputs.prompts import check_template
from alignkd.models.loading import load_vlm
from alignkd.models.vlm import Vlm
from alignkd.pipeline.cache_io.logits import logit_arrays, open_codec
from alignkd.pipeline.cache_io.targets import row_fields
from alignkd.pipeline.cache_io.teacher_fingerprint import model_fingerprint
from alignkd.pipeline.cache_io.teacher_projector import projector_arrays
from alignkd.pipeline.cache_io.teacher_slice import check_slice_options, slice_arrays, slice_fingerprint
from alignkd.pipeline.config.cache_layout import ADVANTAGE
from alignkd.pipeline.config.cache_teacher import CacheTeacherConfig
from alignkd.pipeline.config.targets import TargetSettings
from alignkd.pipeline.data.contract import Samples
from alignkd.pipeline.data.open_samples import check_images, describe_data
from alignkd.pipeline.data.preparer import Prepared, Preparer
from alignkd.pipeline.hub.models import model_folder, pin_models, tower_folder
from alignkd.pipeline.runtime.devices import parse_dtype, pick_device
from alignkd.pipeline.runtime.progress import progress_bar
from alignkd.pipeline.runtime.signals import StopFlag
from alignkd.pipeline.stage_one.appended_samples import SamplesOfPlan, append_samples, find_samples_to_append
from alignkd.pipeline.stage_one.calibrate import CALIBRATION_POSITIONS, CALIBRATION_SAMPLES, NotFiniteError, calibrate
from alignkd.pipeline.stage_one.checks.calibration import calibration_of, check_calibration
from alignkd.pipeline.stage_one.checks.place import check_writable
from alignkd.pipeline.stage_one.checks.rejections import check_existing
from alignkd.pipeline.stage_one.checks.student import check_recipe, check_student
from alignkd.pipeline.stage_one.finite import advice
from alignkd.pipeline.stage_one.planned_samples import cached_prompt_date, find_samples, recorded_configuration
from alignkd.pipeline.stage_one.run_teacher import TeacherOutput, run_teacher
from alignkd.pipeline.stage_one.shard_work import PlannedSample, ReadyBatch, ShardWork, batches
from alignkd.pipeline.stage_one.target_settings import resolve_targets, settings_of_rows
from alignkd.targets.logits import LogitCodec


@dataclass
class StageOne:
    """A loaded teacher and an indexed data file, ready to estimate or to write a cache.

    ``config.settings`` are resolved for the teacher. ``stop`` ends a calibration early.
    """

    config: CacheTeacherConfig
    teacher: Vlm
    template: str
    samples: Samples
    plan: Plan
    stop: StopFlag = field(default_factory=StopFlag)
    logit_codec: LogitCodec | None = None

    @classmethod
    def open(cls, config: CacheTeacherConfig, local_rank: int = 0, stop: StopFlag | None = None) -> "StageOne":
        """Read the data file (or the plan of an earlier run), then load the teacher; first the teacher, to know its answers.

        Raises:
            AlignkdError: one of the two cannot be used, or options contradict each other.
        """
        check_slice_options(config.alignment, set(config.settings.targets), without_tower=config.slice_without_tower)
        recipe = check_recipe(config)
        check_images(config)
        check_writable(config.cache)
        config = pin_models(config, recorded_configuration(config))
        describe_data(config)
        find = find_samples_to_append if config.append else find_samples
        found = None if config.answers == "teacher" else find(config)
        check_existing(config)
        compared = check_student(config, recipe)
        tower = tower_folder(config.vision_tower)
        device = pick_device(config.device, local_rank)
        teacher = load_vlm(model_folder(config.teacher), dtype=parse_dtype(config.dtype), device=device, vision_tower=tower)
        enable_capture(teacher)
        teacher.model.requires_grad_(False)
        if not compared:
            check_student(config, recipe, teacher)
        settings = resolve_targets(config, teacher)
        template = config.template or teacher.default_template
        check_template(template, teacher.templates)
        samples, plan = find(config, teacher.weights_fingerprint()) if found is None else found
        config = replace(config, settings=settings)
        return cls(config, teacher, template, samples, plan, StopFlag() if stop is None else stop)

    @cached_property
    def preparer(self) -> Preparer:
        """Turns samples into inputs of this teacher."""
        config = self.config
        return Preparer.of(
            self.teacher,
            template=self.template,
            max_length=config.max_length,
            with_spans=self.row_settings.cross_model,
            prompt_date=config.prompt_date or cached_prompt_date(config.cache),
            with_destroyed=ADVANTAGE in config.settings.targets,
        )

    @cached_property
    def row_settings(self) -> TargetSettings:
        """The targets that rows hold."""
        return settings_of_rows(self.config.settings, self.config.alignment)

    def spec(self) -> CacheSpec:
        """The cache's fields and fingerprint."""
        return CacheSpec(row_fields(self.row_settings, self.teacher.vocabulary), self.fingerprint())

    def fingerprint(self) -> dict[str, Any]:
        """Everything that determines the targets; stage one refuses a cache with another fingerprint, and so does stage two."""
        teacher, config = self.teacher, self.config
        described = model_fingerprint(teacher, self.template)
        return {
            **described,
            "teacher": {"weights": self._weights, "dtype": config.dtype, **described["teacher"], **self._logit_scale},
            "max_length": config.max_length,
            "targets": config.settings.fingerprint(),
            "alignment": config.alignment,
            **self._slice,
            **self._first_ids,
            **self._prompt_date,
            "data": hashlib.sha256(self.plan.parts[0].keys.tobytes()).hexdigest(),
        }

    @property
    def _logit_scale(self) -> dict[str, float]:
        """The number that the teacher multiplies its head's logits by, where it does."""
        return {} if self.teacher.logit_scale == 1 else {"logit_scale": self.teacher.logit_scale}

    @property
    def _prompt_date(self) -> dict[str, str]:
        """The one date of all prompts, decided when the cache is started: workers of other days or time zones go on with it."""
        date = self.preparer.encoder.prompt_date
        return {"prompt_date": date} if date else {}

    def _take_date_of_cache(self) -> bool:
        """Go on with the date of a worker that started the cache at the same time; whether there is such a date."""
        date, encoder = cached_prompt_date(self.config.cache), self.preparer.encoder
        if self.config.prompt_date or not date or not encoder.prompt_date or encoder.prompt_date == date:
            return False
        encoder.prompt_date = date
        return True

    @property
    def _first_ids(self) -> dict[str, str]:
        """What a student's tokenizer is compared with where distributions are over the first ids only."""
        limit = self.config.settings.logits.vocabulary
        return {} if limit is None else {"tokenizer_first_ids": self.teacher.tokenizer_fingerprint(limit)}

    @cached_property
    def _slice(self) -> dict[str, Any]:
        if self.config.alignment == "targets":
            return {}
        return {"slice": slice_fingerprint(self.teacher, tower=not self.config.slice_without_tower)}

    @cached_property
    def _weights(self) -> str:
        return self.teacher.weights_fingerprint()

    def tensors(self) -> dict[str, np.ndarray]:
        """What the cache keeps once for all rows: made when the cache is started, and never again.

        With ``--calibration-from`` it is what another cache keeps.
        """
        if self.config.calibration_from is not None:
            return calibration_of(self.config.calibration_from, self.spec())
        sliced = self.config.alignment == "slice"
        arrays = slice_arrays(self.teacher, tower=not self.config.slice_without_tower) if sliced else {}
        if "vision" in self.row_settings.targets:
            arrays |= projector_arrays(self.teacher)
        if "logits" in self.row_settings.targets:
            logits = self.row_settings.logits
            try:
                calibration = calibrate(self.teacher, self._calibration_batches(), logits.vocabulary)
            except NotFiniteError as error:
                raise NotFiniteError(f"{error}. {advice(self.config.dtype)}") from error
            arrays |= logit_arrays(logits, calibration)
        return arrays

    def _calibration_batches(self) -> Iterator[Batch]:
        """Samples spread over the data; those that cannot be used are skipped here, and rejected with their shards later."""
        chosen = np.linspace(0, self.plan.samples - 1, min(CALIBRATION_SAMPLES, self.plan.samples)).astype(int).tolist()
        work = self.batch_samples(0, chosen)
        samples = [sample for batch in work.batches for sample in batch]
        parts = list(batches(samples, min(self.config.batch_tokens, CALIBRATION_POSITIONS)))
        with progress_bar("calibrate", len(parts), "batches") as progress:
            for part in parts:
                self.stop.check()
                batch = self.load(part).batch
                if batch is not None:
                    yield batch
                progress.advance()

    def use_tensors(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Encode logits with what the cache keeps once: :meth:`tensors`, or those of the cache."""
        if "logits" in self.row_settings.targets:
            self.logit_codec = open_codec(self.row_settings.logits, arrays, self.teacher.device)

    def open_store(
        self,
        on_start: Callable[[], None] = lambda: None,
        on_tensors: Callable[[dict[str, np.ndarray]], None] = lambda tensors: None,
    ) -> CacheStore:
        """Start the cache, or continue it, or append to it.

        Only a cache that starts needs a calibration: ``on_start`` is called before it, ``on_tensors`` with what it gave.

        Raises:
            FingerprintMismatchError: it was written with other settings.
        """

        def tensors() -> dict[str, np.ndarray]:
            on_start()
            made = self.tensors()
            on_tensors(made)
            return made

        def started() -> CacheStore:
            if isinstance(self.samples, SamplesOfPlan):
                store = append_samples(self.config, self.spec(), self.samples)
                self.plan, self.samples = store.plan, self.samples.at(store.plan)
                return store
            return CacheStore.create_or_open(
                self.config.cache, self.spec(), self.plan, shard_format=self.config.shard_format, tensors=tensors
            )

        try:
            store = started()
        except FingerprintMismatchError:
            if not self._take_date_of_cache():
                raise
            store = started()
        check_calibration(self.config, store)
        self.use_tensors(store.tensors)
        return store

    @property
    def held(self) -> Sequence[int]:
        """The positions of the plan whose samples the data holds: all, but of a cache that is appended to."""
        return self.samples.held if isinstance(self.samples, SamplesOfPlan) else range(self.plan.samples)

    def todo(self, pending: Sequence[int]) -> list[int]:
        """Those of some shards that this run can make: all, or, of a cache that is appended to, those of its data."""
        if not isinstance(self.samples, SamplesOfPlan):
            return list(pending)
        return [shard for shard in pending if self.samples.covers(self.plan.positions_of(shard))]

    def batch_shard(self, shard: int) -> ShardWork:
        """Prepare the texts of a planned shard, and group its samples into batches."""
        return self.batch_samples(shard, self.plan.positions_of(shard))

    def batch_samples(self, number: int, positions: Sequence[int]) -> ShardWork:
        """The same for the samples at any positions of the plan."""
        planned, rejected = [], []
        for position in positions:
            sample = self.samples[position]
            try:
                text = self.preparer.text(sample)
            except SampleError as error:
                rejected.append(Rejected(sample.key, sample.id, str(error)))
                continue
            planned.append(PlannedSample(sample, text))
        return ShardWork(number, list(batches(planned, self.config.batch_tokens)), rejected)

    def load(self, planned: Sequence[PlannedSample]) -> ReadyBatch:
        """Read the images of a batch and collate it, in page-locked memory where the teacher is on a GPU."""
        ready, rejected = [], []
        for one in planned:
            try:
                prepared = self.preparer.with_images(one.sample, one.text)
                self._check_answers(prepared)
                ready.append((one, prepared))
            except SampleError as error:
                rejected.append(Rejected(one.sample.key, one.sample.id, str(error)))
        return ReadyBatch(ready, self.collate(ready) if ready else None, rejected)

    def _check_answers(self, prepared: Prepared) -> None:
        """Reject an answer with a token that the cached distributions leave out.

        Raises:
            SampleError: names the token.
        """
        limit = self.config.settings.logits.vocabulary
        beyond = [] if limit is None else prepared.input.labels[prepared.input.labels >= limit].tolist()
        if beyond:
            token = self.teacher.tokenizer.convert_ids_to_tokens(beyond[0])
            raise SampleError(
                f"its answer holds {token!r}, id {beyond[0]}, but --logit-vocabulary {limit} keeps only the ids below {limit}"
            )

    def collate(self, ready: Sequence[tuple[PlannedSample, Prepared]]) -> Batch:
        """Pad inputs into one batch on the host."""
        batch = self.teacher.collate([prepared.input for _, prepared in ready])
        return batch.pin_memory() if self.teacher.device.type == "cuda" else batch

    def run(self, ready: ReadyBatch) -> TeacherOutput:
        """One forward pass of the teacher over a batch, which must hold a sample."""
        assert ready.batch is not None
        keys = [planned.sample.key for planned, _ in ready.samples]
        return run_teacher(self.teacher, ready.batch, ready.inputs, self.row_settings, self.logit_codec, keys)
