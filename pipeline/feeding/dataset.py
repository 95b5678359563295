"""Feed stage two: samples and the rows that belong to them, checked against each other one by one."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from alignkd.cache_store.errors import CorruptShardError, MissingRowError
from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.cache_store.rows.row import EncodedField
from alignkd.errors import SampleError
from alignkd.inputs.batch import ModelInput
from alignkd.models.vlm import Vlm
from alignkd.pipeline.cache_io.cross_model import LAYOUT, CrossModelMap, TargetMask, with_masks
from alignkd.pipeline.cache_io.logits import logit_fields, settings_of
from alignkd.pipeline.cache_io.targets import collate_targets
from alignkd.pipeline.config.cache_layout import attention_field, attention_layer
from alignkd.pipeline.data.preparer import Prepared, Preparer
from alignkd.pipeline.data.rejected_samples import RejectedSamples
from alignkd.pipeline.data.samples import Sample, SampleFile
from alignkd.pipeline.feeding.order import SHARDS_OPEN
from alignkd.pipeline.feeding.row_checks import MisalignedRowError, check_images, check_row
from alignkd.pipeline.feeding.shared_memory import SharedMemoryBatch
from alignkd.targets.batch_targets import Targets
from alignkd.targets.cross_model import CrossModelError


@dataclass(frozen=True)
class TrainingExample:
    """A prepared sample with what it needs of the cache, as it is stored; ``target_mask``: what has a target, if not all."""

    sample_id: str
    input: ModelInput
    stored: dict[str, EncodedField]
    target_mask: TargetMask | None = None


@dataclass(frozen=True)
class FailedSample:
    """A sample that gave no item. Passed on as a value, so that it crosses worker processes with its plain message.

    ``fatal``: a misaligned row, which must end the run; otherwise the sample is left out and counted.
    """

    key: str
    sample_id: str
    reason: str
    fatal: bool


class Positions(list[int]):
    """A micro-batch with the shards that those after it need, for a worker to open while there is time."""

    def __init__(self, positions: Iterable[int], coming: Sequence[int]) -> None:
        super().__init__(positions)
        self.coming = coming

    def __reduce__(self) -> tuple[Any, ...]:
        return Positions, (list(self), self.coming)


class TrainingSet(Dataset["TrainingExample | FailedSample"]):
    """The usable samples of a data file, each with its row; ``across``: of a teacher of another make."""

    def __init__(
        self,
        samples: SampleFile,
        preparer: Preparer,
        *,
        student: Vlm,
        reader: CacheReader | None,
        needs: frozenset[str],
        max_rejected: int,
        attention_layers: Sequence[int] = (0,),
        across: CrossModelMap | None = None,
    ) -> None:
        self.samples, self.preparer, self.reader, self.across = samples, preparer, reader, across
        self.collator = student.collator
        self.fields = [attention_field(layer) for layer in attention_layers] if "attention" in needs else []
        self.fields += ["vision_tokens"] if "vision" in needs else []
        if "logits" in needs:
            assert reader is not None
            settings = settings_of(reader.fingerprint)
            self.fields += [field.name for field in logit_fields(settings, student.vocabulary)]
        self.rejects = RejectedSamples(max_rejected)
        self.indices = self._usable()
        if not len(self.indices):
            raise ValueError(f"no sample of {samples.path} can be trained on; first reasons: {self._first_reasons()}")

    def _usable(self) -> np.ndarray:
        """Leave out what stage one rejected: named, counted, capped.

        Raises:
            ValueError: a sample has no row at all.
        """
        if self.reader is None:
            return np.arange(len(self.samples))
        shards = self.reader.shards_of(self.samples.keys)
        for index in np.flatnonzero(shards < 0).tolist():
            raise ValueError(f"sample {self.samples[index].id!r} has no row in the cache. {self._missing(index)}")
        kept = np.ones(len(self.samples), dtype=bool)
        if self.reader.rejected:
            for index in range(len(self.samples)):
                rejected = self.reader.rejected.get(self.samples.key(index))
                if rejected is not None:
                    kept[index] = False
                    self.rejects.add(rejected.sample_id or rejected.key, rejected.reason)
        return np.flatnonzero(kept)

    def fingerprint(self) -> str:
        """Digest of the samples and their order in the file."""
        return hashlib.sha256(self.samples.keys[self.indices].tobytes()).hexdigest()

    def _missing(self, index: int) -> str:
        assert self.reader is not None
        try:
            self.reader.shard_of(self.samples.key(index))
        except MissingRowError as error:
            return str(error)
        raise AssertionError("a row that is there was reported missing")

    def _first_reasons(self) -> str:
        return "; ".join(f"{name}: {why}" for name, why in list(self.rejects.reasons.items())[:3])

    @cached_property
    def shard_of_sample(self) -> np.ndarray:
        """The shard of each sample's row, ``[samples]``; zeros without a cache."""
        if self.reader is None:
            return np.zeros(len(self.indices), dtype=np.int64)
        return self.reader.shards_of(self.samples.keys[self.indices])

    def __len__(self) -> int:
        return len(self.indices)

    def sample(self, position: int) -> Sample:
        """The sample at a position of this set."""
        return self.samples[int(self.indices[position])]

    def __getitems__(self, positions: list[int]) -> list[TrainingExample | FailedSample]:
        """A batch, which may be empty; the shards it needs are fetched side by side, and those of :class:`Positions` begun."""
        if self.reader is not None and self.fields:
            self.reader.prefetch(self.shard_of_sample[positions].tolist())
            if isinstance(positions, Positions) and self.reader.max_shards >= 2 * SHARDS_OPEN:
                self.reader.prefetch(positions.coming)
        return [self[position] for position in positions]

    def __getitem__(self, position: int) -> TrainingExample | FailedSample:
        sample = self.sample(position)
        try:
            prepared = self.preparer(sample)
            if self.reader is None or not self.fields:
                return TrainingExample(sample.id or sample.key, prepared.input, {})
            if self.across is not None:
                return self._across(sample, prepared, self.across)
            row = self.reader.row(sample.key, {"input_ids", "labels"})
            stored = self.reader.encoded_fields(sample.key, self.fields)
            check_row(sample, prepared, row, stored, self.collator)
        except SampleError as error:
            return FailedSample(sample.key, sample.id or sample.key, str(error), fatal=False)
        except (MisalignedRowError, CorruptShardError) as error:
            return FailedSample(sample.key, sample.id or sample.key, str(error), fatal=True)
        return TrainingExample(sample.id or sample.key, prepared.input, dict(stored))

    def _across(self, sample: Sample, prepared: Prepared, across: CrossModelMap) -> TrainingExample:
        """A sample with the row that a teacher of another make left.

        Raises:
            MisalignedRowError: the two cannot be aligned; names the sample and the cause.
        """
        assert self.reader is not None
        visual = {name for name in self.fields if attention_layer(name) is not None or name == "vision_tokens"}
        row = self.reader.row(sample.key, visual | LAYOUT if visual else LAYOUT - {"regions"})
        check_images(sample, prepared, row)
        stored = self.reader.encoded_fields(sample.key, [name for name in self.fields if name not in visual])
        try:
            found, compared = across(row, prepared.input, stored)
        except CrossModelError as error:
            raise MisalignedRowError(f"sample {sample.id!r} cannot be aligned with its row in the cache: {error}") from error
        return TrainingExample(sample.id or sample.key, prepared.input, found, compared)

    def collate(self, items: Sequence[TrainingExample | FailedSample]) -> dict[str, Any]:
        """Items to ``{"batch", "targets", "failures", "ids"}``; ``batch`` is None when every sample failed, or there is none.

        ``ids`` of the samples in the batch, in its order.
        """
        good = [item for item in items if isinstance(item, TrainingExample)]
        failures = [item for item in items if isinstance(item, FailedSample)]
        if not good:
            return SharedMemoryBatch(batch=None, targets=None, failures=failures, ids=[])
        batch = self.collator([item.input for item in good])
        targets = Targets()
        if self.fields:
            targets = collate_targets([item.stored for item in good], batch)
            targets = with_masks(targets, [item.target_mask for item in good if item.target_mask is not None], batch)
        return SharedMemoryBatch(batch=batch, targets=targets, failures=failures, ids=[item.sample_id for item in good])
