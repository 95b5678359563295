"""The samples of stage two with their cached rows, each pair checked."""

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
from alignkd.errors import CacheError, SampleError
from alignkd.inputs.batch import ModelInput
from alignkd.models.vlm import Vlm
from alignkd.pipeline.cache_io.cross_model import LAYOUT, CrossModelMap, TargetMask, with_masks
from alignkd.pipeline.cache_io.logits import logit_fields, settings_of
from alignkd.pipeline.cache_io.targets import collate_targets
from alignkd.pipeline.config.cache_layout import attention_field, attention_layer
from alignkd.pipeline.data.preparer import Prepared, Preparer
from alignkd.pipeline.data.rejected_samples import RejectedSamples
from alignkd.pipeline.data.sample import Sample
from alignkd.pipeline.data.samples import SampleFile
from alignkd.pipeline.feeding.order import WINDOW_SHARDS
from alignkd.pipeline.feeding.row_checks import MisalignedRowError, check_images, check_row
from alignkd.pipeline.feeding.shared_memory import SharedMemoryBatch
from alignkd.plugins import load_plugins, loaded_plugins
from alignkd.targets.batch_targets import Targets
from alignkd.targets.cross_model import CrossModelError


@dataclass(frozen=True)
class TrainingExample:
    """A prepared sample with its cached fields, still encoded.

    ``target_mask``: which of its tokens have a target, None where all have one. ``truncated``: its text was cut at the
    maximum length. ``doubtful``: references of its images that show little or nothing.
    """

    sample_id: str
    input: ModelInput
    stored: dict[str, EncodedField]
    target_mask: TargetMask | None = None
    truncated: bool = False
    doubtful: tuple[str, ...] = ()


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
    teacher's, whose attention is read.

    Raises:
        CacheError: a sample has no row.
        DataError: no sample can be used, or too many were rejected.
    """

    def __init__(
        self,
        samples: SampleFile,
        preparer: Preparer,
        *,
        student: Vlm,
        reader: CacheReader | None,
        needs: frozenset[str],
        max_rejected: int | str,
        attention_layers: Sequence[int] = (0,),
        cross_model: CrossModelMap | None = None,
    ) -> None:
        self.samples, self.preparer, self.reader, self.cross_model = samples, preparer, reader, cross_model
        self.collator = student.collator
        self.fields = [attention_field(layer) for layer in attention_layers] if "attention" in needs else []
        self.fields += ["vision_tokens"] if "vision" in needs else []
        if "logits" in needs:
            assert reader is not None
            settings = settings_of(reader.fingerprint)
            self.fields += [field.name for field in logit_fields(settings, student.vocabulary)]
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
        if self.reader is None:
            return np.arange(len(self.samples))
        shards = self.reader.shards_of(self.samples.keys)
        kept = np.ones(len(self.samples), dtype=bool)
        for index in np.flatnonzero(shards < 0).tolist():
            sample = self.samples[index]
            if not sample.fault:
                raise CacheError(f"sample {sample.id!r} has no row in the cache. {self._missing(index)}")
            kept[index] = False
            self.rejects.add(sample.id or sample.key, sample.fault)
        if self.reader.rejected:
            for index in range(len(self.samples)):
                rejected = self.reader.rejected.get(self.samples.key(index))
                if rejected is not None:
                    kept[index] = False
                    self.rejects.note(rejected.sample_id or rejected.key, rejected.reason, key=rejected.key)
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

    @cached_property
    def shard_of_sample(self) -> np.ndarray:
        """The shard of each sample's row, ``[samples]``; zeros without a cache."""
        if self.reader is None:
            return np.zeros(len(self.indices), dtype=np.int64)
        return self.reader.shards_of(self.samples.keys[self.indices])

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
        if self.reader is not None and self.fields:
            self.reader.prefetch(self.shard_of_sample[positions].tolist())
            if isinstance(positions, MicroBatchSamples) and self.reader.max_shards >= 2 * WINDOW_SHARDS:
                self.reader.prefetch(positions.upcoming_shards)
        return [self[position] for position in positions]

    def __getitem__(self, position: int) -> TrainingExample | FailedSample:
        sample = self.sample(position)
        name = sample.id or sample.key
        try:
            prepared = self.preparer(sample)
            stored, mask = self._stored(sample, prepared)
        except SampleError as error:
            return FailedSample(sample.key, name, str(error), fatal=False)
        except (CacheError, CorruptShardError) as error:
            return FailedSample(sample.key, name, str(error), fatal=True)
        doubtful = tuple(reference for reference in sample.images if reference in self.preparer.doubtful.found)
        return TrainingExample(name, prepared.input, stored, mask, prepared.truncated, doubtful)

    def _stored(self, sample: Sample, prepared: Prepared) -> tuple[dict[str, EncodedField], TargetMask | None]:
        """A sample's cached fields, checked, and which of its tokens have a target, None where all have.

        Raises:
            MisalignedRowError: the row does not belong to the sample; names it and the cause.
        """
        if self.reader is None or not self.fields:
            return {}, None
        if self.cross_model is not None:
            return self._mapped(sample, prepared, self.reader, self.cross_model)
        row = self.reader.row(sample.key, {"input_ids", "labels"})
        stored = self.reader.encoded_fields(sample.key, self.fields)
        check_row(sample, prepared, row, stored, self.collator)
        return dict(stored), None

    def _mapped(
        self, sample: Sample, prepared: Prepared, reader: CacheReader, cross_model: CrossModelMap
    ) -> tuple[dict[str, EncodedField], TargetMask | None]:
        """The row of a teacher of another model family, mapped to this student.

        Raises:
            MisalignedRowError: the two cannot be mapped; names the sample and the cause.
        """
        visual = {name for name in self.fields if attention_layer(name) is not None or name == "vision_tokens"}
        row = reader.row(sample.key, visual | LAYOUT if visual else LAYOUT - {"regions"})
        check_images(sample, prepared, row)
        stored = reader.encoded_fields(sample.key, [name for name in self.fields if name not in visual])
        try:
            return cross_model(row, prepared.input, stored)
        except CrossModelError as error:
            raise MisalignedRowError(f"sample {sample.id!r} cannot be mapped to its row in the cache: {error}") from error

    def collate(self, items: Sequence[TrainingExample | FailedSample]) -> dict[str, Any]:
        """Examples to ``{"batch", "targets", "failures", "ids", "truncated", "padding", "doubtful"}``.

        ``batch`` is None without a usable sample. ``ids``: the ids of the batch's samples, in its order. ``truncated``: how
        many of them were cut at the maximum length. ``padding``: positions of the batch that only fill it up. ``doubtful``:
        references of images that show little or nothing.
        """
        good = [item for item in items if isinstance(item, TrainingExample)]
        failures = [item for item in items if isinstance(item, FailedSample)]
        if not good:
            return SharedMemoryBatch(batch=None, targets=None, failures=failures, ids=[], truncated=0, padding=0, doubtful=[])
        batch = self.collator([item.input for item in good])
        targets = Targets()
        if self.fields:
            targets = collate_targets([item.stored for item in good], batch)
            targets = with_masks(targets, [item.target_mask for item in good if item.target_mask is not None], batch)
        return SharedMemoryBatch(
            batch=batch,
            targets=targets,
            failures=failures,
            ids=[item.sample_id for item in good],
            truncated=sum(item.truncated for item in good),
            doubtful=sorted({reference for item in good for reference in item.doubtful}),
            padding=batch.input_ids_BS.numel() - int(batch.attention_mask_BS.sum()),
        )
