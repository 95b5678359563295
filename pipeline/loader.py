"""Feed stage two: samples and the rows that belong to them, checked against each other one by one."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from alignkd.batch import ModelInput, collate
from alignkd.cache_store.reader import CacheReader, MissingRow
from alignkd.cache_store.row import Row
from alignkd.cache_store.shard import CorruptShard
from alignkd.models.vlm import Vlm
from alignkd.pipeline.prepare import Prepared, Preparer, SampleError
from alignkd.pipeline.rejects import Rejects
from alignkd.pipeline.samples import Sample, SampleFile
from alignkd.pipeline.targets_io import collate_targets
from alignkd.targets import Targets

SHARDS_OPEN = 8
"""Shards a worker keeps in memory, and shards whose samples are mixed with each other."""

_FIELDS = {
    "attention": ("attention",),
    "vision": ("vision_tokens",),
    "logits": ("topk_ids", "topk_logprobs", "tail_logmass"),
}


class MisalignedRow(ValueError):  # noqa: N818 - the name says what is the matter
    """A cached row is not about the sample it is used for."""


@dataclass(frozen=True)
class Item:
    """A prepared sample with the cached values it needs (empty without a cache)."""

    input: ModelInput
    values: dict[str, np.ndarray]


@dataclass(frozen=True)
class Failure:
    """A sample that gave no item. Passed on as a value, so that it crosses worker processes with its plain message.

    ``fatal``: a misaligned row, which must end the run; otherwise the sample is left out and counted.
    """

    key: str
    sample_id: str
    reason: str
    fatal: bool


class TrainingSet(Dataset["Item | Failure"]):
    """The usable samples of a data file, each with its row."""

    def __init__(
        self,
        samples: SampleFile,
        preparer: Preparer,
        *,
        student: Vlm,
        reader: CacheReader | None,
        needs: frozenset[str],
        max_rejected: int,
    ) -> None:
        self.samples, self.preparer, self.reader = samples, preparer, reader
        self.vision_tokens_per_image = student.vision_tokens_per_image
        self.pad_token_id = int(student.tokenizer.pad_token_id)
        self.fields = [name for need in sorted(needs) for name in _FIELDS[need]]
        self._read = {"input_ids", "labels", *self.fields}
        self.rejects = Rejects(max_rejected)
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
        except MissingRow as error:
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

    def __getitems__(self, positions: list[int]) -> list[Item | Failure]:
        """A batch; the shards it needs are fetched side by side."""
        if self.reader is not None and self.fields:
            self.reader.prefetch(self.shard_of_sample[positions].tolist())
        return [self[position] for position in positions]

    def __getitem__(self, position: int) -> Item | Failure:
        sample = self.sample(position)
        try:
            prepared = self.preparer(sample)
            if self.reader is None or not self.fields:
                return Item(prepared.input, {})
            row = self.reader.row(sample.key, self._read)
            check_row(sample, prepared, row, self.vision_tokens_per_image)
        except SampleError as error:
            return Failure(sample.key, sample.id or sample.key, str(error), fatal=False)
        except (MisalignedRow, CorruptShard) as error:
            return Failure(sample.key, sample.id or sample.key, str(error), fatal=True)
        return Item(prepared.input, {name: row.values[name] for name in self.fields})

    def collate(self, items: Sequence[Item | Failure]) -> dict[str, Any]:
        """Items to ``{"batch", "targets", "failures"}``; ``batch`` is None when every sample failed."""
        good = [item for item in items if isinstance(item, Item)]
        failures = [item for item in items if isinstance(item, Failure)]
        if not good:
            return {"batch": None, "targets": None, "failures": failures}
        batch = collate(
            [item.input for item in good],
            vision_tokens_per_image=self.vision_tokens_per_image,
            pad_token_id=self.pad_token_id,
        )
        targets = collate_targets([item.values for item in good], batch) if self.fields else Targets()
        return {"batch": batch, "targets": targets, "failures": failures}


def check_row(sample: Sample, prepared: Prepared, row: Row, vision_tokens_per_image: int) -> None:
    """Compare a row with the sample as this run prepared it.

    Raises:
        MisalignedRow: token ids, labels, images or the number of vision tokens differ; names the sample and the cause.
    """
    found: str | None = None
    if not np.array_equal(row.values["input_ids"], prepared.input.input_ids):
        found = "its token ids differ: the tokenizer, template or maximum length is not the cache's"
    elif not np.array_equal(row.values["labels"], prepared.input.labels):
        found = "its labels differ: the template is not the cache's"
    elif row.image_sha256 != prepared.image_sha256:
        found = "its image file differs from the one the teacher saw: --images points elsewhere, or the file has changed"
    elif "vision_tokens" in row.values:
        expected = len(sample.images) * vision_tokens_per_image
        if row.values["vision_tokens"].shape[0] != expected:
            found = f"it holds {row.values['vision_tokens'].shape[0]} vision tokens where the student has {expected}"
    if found is not None:
        raise MisalignedRow(f"sample {sample.id!r} does not match its row in the cache: {found}")
