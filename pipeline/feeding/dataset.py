"""The samples of stage two with their cached rows, each pair checked."""

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from alignkd.cache_store.errors import CorruptShardError
from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.cache_store.rows.row import EncodedField
from alignkd.errors import CacheError, SampleError
from alignkd.inputs.batch import ModelInput
from alignkd.models.vlm import Vlm
from alignkd.pipeline.cache_io.cross_model import CrossModelMap, TargetMask, with_masks
from alignkd.pipeline.cache_io.several import TaughtRow, collate_several
from alignkd.pipeline.cache_io.targets import collate_targets
from alignkd.pipeline.data.authors import taken_by
from alignkd.pipeline.data.contract import Samples
from alignkd.pipeline.data.preparer import Prepared, Preparer
from alignkd.pipeline.data.provenance import AnswerChoice
from alignkd.pipeline.data.rejected_samples import RejectedSamples
from alignkd.pipeline.data.sample import Sample
from alignkd.pipeline.feeding.order import WINDOW_SHARDS
from alignkd.pipeline.feeding.shared_memory import SharedMemoryBatch
from alignkd.pipeline.feeding.teacher_rows import TeacherRows, Teaching, named, target_fields, why_missing
from alignkd.plugins import load_plugins, loaded_plugins
from alignkd.targets.batch_targets import Targets
from alignkd.targets.several import SeveralTargets

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingExample:
    """A prepared sample with its cached fields, still encoded.

    ``target_mask``: which of its tokens have a target, None where all have one. ``truncated``: its text was cut at the
    maximum length. ``doubtful``: names of its images that show little or nothing. ``rows``: in place of ``stored`` and
    ``target_mask``, what each teacher has for it, where there are several. ``written``: a model wrote its answers.
    """

    sample_id: str
    input: ModelInput
    stored: dict[str, EncodedField]
    target_mask: TargetMask | None = None
    truncated: bool = False
    doubtful: tuple[str, ...] = ()
    rows: tuple[TaughtRow, ...] = ()
    written: bool = False


@dataclass(frozen=True)
class FailedSample:
    """A sample that cannot be used. It is a value and not an error, so that loader processes can send it with its message.

    ``fatal``: its row is misaligned or damaged, which ends the run; otherwise the sample is rejected and counted.
    """

    key: str
    sample_id: str
    reason: str
    fatal: bool


class MicroBatchSamples(list[int]):
    """The samples of a micro-batch, as indices, with the shards that later micro-batches need: a worker opens them early."""

    def __init__(self, samples: Iterable[int], upcoming_shards: Sequence[int]) -> None:
        super().__init__(samples)
        self.upcoming_shards = upcoming_shards

    def __reduce__(self) -> tuple[Any, ...]:
        return MicroBatchSamples, (list(self), self.upcoming_shards)


def _with_plugins(paths: Sequence[str]) -> "TrainingSet":
    load_plugins(paths)
    return TrainingSet.__new__(TrainingSet)


class TrainingSet(Dataset["TrainingExample | FailedSample"]):
    """The usable samples of a data file, each with its row.

    ``cross_model`` maps rows to this student's targets; without it they are used unchanged. ``attention_layers``: the
    teacher's, whose attention is read. ``others``: the caches of further teachers; ``weight``: of the first one. A sample then
    needs a row in one of the caches.

    Raises:
        CacheError: a sample has no row.
        DataError: no sample can be used, or too many were rejected.
    """

    def __init__(
        self,
        samples: Samples,
        preparer: Preparer,
        *,
        student: Vlm,
        reader: CacheReader | None,
        needs: frozenset[str],
        max_rejected: int | str,
        attention_layers: Sequence[int] = (0,),
        cross_model: CrossModelMap | None = None,
        others: Sequence[TeacherRows] = (),
        weight: float = 1.0,
    ) -> None:
        self.samples, self.preparer, self.reader, self.cross_model = samples, preparer, reader, cross_model
        self.collator = student.collator
        self.fields = target_fields(reader, student, needs, attention_layers)
        self.caches: tuple[TeacherRows, ...] = ()
        if reader is not None:
            self.caches = (TeacherRows(reader, tuple(self.fields), cross_model, weight), *others)
        self.teaching: Teaching | None = None
        self.rejects = RejectedSamples(max_rejected, len(samples.unique()))
        self.indices = self._usable()
        self.rejects.check()

    def __reduce__(self) -> tuple[Any, ...]:
        """A spawned loader process loads the plugins first: the state may hold objects of their classes."""
        return _with_plugins, ([plugin.path for plugin in loaded_plugins()],), self.__dict__

    def _usable(self) -> np.ndarray:
        """The indices of samples that stage one did not reject. The others are named, counted and limited.

        Raises:
            CacheError: a sample is not in the cache at all.
        """
        if not self.caches:
            return np.arange(len(self.samples))
        shards_KN = np.stack([cache.reader.shards_of(self.samples.keys) for cache in self.caches])
        kept = np.ones(len(self.samples), dtype=bool)
        absent: np.ndarray = np.asarray((shards_KN < 0).all(axis=0))
        if absent.any():
            kept = self._of_chosen_answers(absent)
        for index in np.flatnonzero(absent & kept).tolist():
            sample = self.samples[index]
            if not sample.fault:
                where = "the cache" if len(self.caches) == 1 else f"any of the {len(self.caches)} caches"
                missing = why_missing(self.caches, self.samples.key(index))
                raise CacheError(f"sample {sample.id!r} has no row in {where}. {missing}")
            kept[index] = False
            self.rejects.add(sample.id or sample.key, sample.fault)
        if len(self.caches) > 1:
            self.teaching = Teaching.of(self.caches, self.samples.keys)
        if any(cache.reader.rejected for cache in self.caches):
            self._note_rejected(kept)
        usable = np.flatnonzero(kept)
        self.teaching = self.teaching and self.teaching.only(usable)
        return usable

    def _of_chosen_answers(self, absent: np.ndarray) -> np.ndarray:
        """Which samples the caches should have, or have: those of answers that none of them was written for are left out."""
        plans = [plan for cache in self.caches for plan in cache.reader.plan.parts]
        kept: np.ndarray = ~absent | taken_by(self.samples, [AnswerChoice.of_meta(plan.meta) for plan in plans])
        if left_out := int((~kept).sum()):
            _log.info("%s samples are left out: their answers are not those that the cache was written for", f"{left_out:,}")
        return kept

    def _note_rejected(self, kept: np.ndarray) -> None:
        """Leave out samples that stage one rejected for every teacher that could have taught them."""
        taught = np.zeros(len(self.samples), dtype=bool) if self.teaching is None else self.teaching.taught
        for index in np.flatnonzero(kept & ~taught).tolist():
            key = self.samples.key(index)
            rejected = next((found for cache in self.caches if (found := cache.reader.rejected.get(key))), None)
            if rejected is not None:
                kept[index] = False
                self.rejects.note(rejected.sample_id or rejected.key, rejected.reason, key=rejected.key)

    def fingerprint(self) -> str:
        """Digest of the samples and their order in the file; of several teachers, also of who teaches which."""
        digest = hashlib.sha256(self.samples.keys[self.indices].tobytes())
        if self.teaching is not None:
            digest.update(np.ascontiguousarray(self.teaching.weights_KN).tobytes())
        return digest.hexdigest()

    @cached_property
    def shard_of_sample(self) -> np.ndarray:
        """The shard of each sample's row, ``[samples]``; zeros without a cache; numbers of their own for several."""
        if self.teaching is not None:
            return self.teaching.shard_of_sample
        if self.reader is None:
            return np.zeros(len(self.indices), dtype=np.int64)
        return self.reader.shards_of(self.samples.keys[self.indices])

    @property
    def weights(self) -> np.ndarray | None:
        """How often an epoch takes each sample, ``[samples]``; None where each is taken once."""
        weights = self.samples.weights
        return None if weights is None else weights[self.indices]

    @property
    def text_only(self) -> np.ndarray | None:
        """Which samples have no image, ``[samples]`` of bool; None where the data file was not read for it."""
        counts = self.samples.image_counts
        return None if counts is None else counts[self.indices] == 0

    def __len__(self) -> int:
        return len(self.indices)

    def sample(self, position: int) -> Sample:
        """The sample at an index of this set."""
        return self.samples[int(self.indices[position])]

    def __getitems__(self, positions: list[int]) -> list[TrainingExample | FailedSample]:
        """A micro-batch, which may be empty. Its shards are read in parallel; those of later ones are begun."""
        upcoming = positions.upcoming_shards if isinstance(positions, MicroBatchSamples) else ()
        for cache, now, soon in zip(self.caches, *self._shards(positions, upcoming), strict=True):
            if cache.fields:
                cache.reader.prefetch(now)
                if soon and cache.reader.max_shards >= 2 * WINDOW_SHARDS:
                    cache.reader.prefetch(soon)
        return [self[position] for position in positions]

    def _shards(self, positions: list[int], upcoming: Sequence[int]) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
        """The shards of each cache that samples need now, and those of ``upcoming``."""
        if self.teaching is not None:
            return self.teaching.shards_of(positions), self.teaching.of_each(upcoming)
        one = len(self.caches)
        return [self.shard_of_sample[positions].tolist()][:one], [upcoming][:one]

    def __getitem__(self, position: int) -> TrainingExample | FailedSample:
        sample = self.sample(position)
        name = sample.id or sample.key
        try:
            prepared = self.preparer(sample)
            stored, mask = self._stored(sample, prepared)
            rows = self._rows(position, sample, prepared)
        except SampleError as error:
            return FailedSample(sample.key, name, str(error), fatal=False)
        except (CacheError, CorruptShardError) as error:
            return FailedSample(sample.key, name, str(error), fatal=True)
        doubtful = _named(sample, [place in self.preparer.doubtful.found for place in self.preparer.places(sample)])
        return TrainingExample(name, prepared.input, stored, mask, prepared.truncated, doubtful, rows, bool(sample.provenance))

    def _stored(self, sample: Sample, prepared: Prepared) -> tuple[dict[str, EncodedField], TargetMask | None]:
        """What the only teacher has for a sample; nothing where there are several."""
        return self.caches[0].stored(sample, prepared, self.collator) if len(self.caches) == 1 else ({}, None)

    def _rows(self, position: int, sample: Sample, prepared: Prepared) -> tuple[TaughtRow, ...]:
        """What each of several teachers has for a sample; nothing where there is one."""
        if self.teaching is None:
            return ()
        found = []
        for number, weight in self.teaching.teachers_of(position):
            try:
                found.append(TaughtRow(number, weight, *self.caches[number].stored(sample, prepared, self.collator)))
            except CacheError as error:
                raise named(self.caches[number], error) from error
        return tuple(found)

    def collate(self, items: Sequence[TrainingExample | FailedSample]) -> dict[str, Any]:
        """Examples to ``{"batch", "targets", "failures", "ids", "truncated", "padding", "doubtful", "written"}``.

        ``batch`` is None without a usable sample. ``ids``: the ids of the batch's samples, in its order. ``truncated``: how
        many of them were cut at the maximum length. ``padding``: positions of the batch that only fill it up. ``doubtful``:
        places of images that show little or nothing. ``written``: for each sample, whether a model wrote its answers.
        """
        good = [item for item in items if isinstance(item, TrainingExample)]
        failures = [item for item in items if isinstance(item, FailedSample)]
        if not good:
            nothing: dict[str, Any] = {"ids": [], "truncated": 0, "padding": 0, "doubtful": [], "written": []}
            return SharedMemoryBatch(batch=None, targets=None, failures=failures, **nothing)
        batch = self.collator([item.input for item in good])
        targets: Targets | SeveralTargets = Targets()
        if self.teaching is not None:
            targets = collate_several([item.rows for item in good], len(self.caches), batch)
        elif self.fields:
            targets = collate_targets([item.stored for item in good], batch)
            targets = with_masks(targets, [item.target_mask for item in good if item.target_mask is not None], batch)
        return SharedMemoryBatch(
            batch=batch,
            targets=targets,
            failures=failures,
            ids=[item.sample_id for item in good],
            truncated=sum(item.truncated for item in good),
            written=[item.written for item in good],
            doubtful=sorted({place for item in good for place in item.doubtful}),
            padding=batch.input_ids_BS.numel() - int(batch.attention_mask_BS.sum()),
        )


def _named(sample: Sample, chosen: Sequence[bool]) -> tuple[str, ...]:
    """Some of a sample's images as the data names them, with the dataset where there are several."""
    of = f"{sample.source}: " if sample.source else ""
    return tuple(f"{of}{image}" for image, wanted in zip(sample.images, chosen, strict=True) if wanted)
