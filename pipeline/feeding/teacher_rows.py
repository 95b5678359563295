"""The rows of a cache as one teacher's targets for the student, and which of several teachers teaches which sample.

Shapes: K teachers, N samples.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from alignkd.cache_store.errors import MissingRowError
from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.cache_store.rows.row import EncodedField, Rejected
from alignkd.errors import CacheError
from alignkd.inputs.batch import Collator
from alignkd.models.vlm import Vlm
from alignkd.pipeline.cache_io.cross_model import LAYOUT, CrossModelMap, TargetMask
from alignkd.pipeline.cache_io.logits import logit_fields, settings_of
from alignkd.pipeline.config.cache_layout import ADVANTAGE, attention_field, attention_layer
from alignkd.pipeline.data.preparer import Prepared
from alignkd.pipeline.data.sample import Sample
from alignkd.pipeline.feeding.row_checks import MisalignedRowError, check_images, check_row
from alignkd.targets.cross_model import CrossModelError


def target_fields(
    reader: CacheReader | None, student: Vlm, needs: frozenset[str], attention_layers: Sequence[int] = (0,)
) -> list[str]:
    """The fields of a cache's rows that hold the targets ``needs``; ``attention_layers`` are the teacher's."""
    fields = [attention_field(layer) for layer in attention_layers] if "attention" in needs else []
    fields += ["vision_tokens"] if "vision" in needs else []
    if "logits" in needs:
        assert reader is not None
        fields += [field.name for field in logit_fields(settings_of(reader.fingerprint), student.vocabulary)]
    return fields + ([ADVANTAGE] if ADVANTAGE in needs else [])


@dataclass(frozen=True)
class TeacherRows:
    """The rows of one cache. ``fields``: those that are targets. ``cross_model``: maps them to the student's tokens; without it
    they are used unchanged. ``weight``: how much the teacher counts for a sample that others teach, too.
    """

    reader: CacheReader
    fields: tuple[str, ...]
    cross_model: CrossModelMap | None = None
    weight: float = 1.0

    def stored(
        self, sample: Sample, prepared: Prepared, collator: Collator
    ) -> tuple[dict[str, EncodedField], TargetMask | None]:
        """A sample's cached fields, checked, and which of its tokens have a target, None where all have.

        Raises:
            MisalignedRowError: the row does not belong to the sample; names it and the cause.
        """
        if not self.fields:
            return {}, None
        if self.cross_model is not None:
            return self._mapped(sample, prepared, self.cross_model)
        row = self.reader.row(sample.key, {"input_ids", "labels"})
        stored = self.reader.encoded_fields(sample.key, self.fields)
        check_row(sample, prepared, row, stored, collator)
        return dict(stored), None

    def _mapped(
        self, sample: Sample, prepared: Prepared, cross_model: CrossModelMap
    ) -> tuple[dict[str, EncodedField], TargetMask | None]:
        """The row of a teacher of another model family, mapped to this student.

        Raises:
            MisalignedRowError: the two cannot be mapped; names the sample and the cause.
        """
        visual = {name for name in self.fields if attention_layer(name) is not None or name == "vision_tokens"}
        row = self.reader.row(sample.key, visual | LAYOUT if visual else LAYOUT - {"regions"})
        check_images(sample, prepared, row)
        stored = self.reader.encoded_fields(sample.key, [name for name in self.fields if name not in visual])
        try:
            return cross_model(row, prepared.input, stored)
        except CrossModelError as error:
            raise MisalignedRowError(f"sample {sample.id!r} cannot be mapped to its row in the cache: {error}") from error


@dataclass(frozen=True)
class Teaching:
    """Which of several teachers teaches which sample. ``weights_KN``: 0 where it does not; those of a sample add up to 1, or to
    0 where no cache has its row. ``shards_KN``: the shard of its row in each cache, -1 where there is none.
    """

    weights_KN: np.ndarray
    shards_KN: np.ndarray
    first_shards_K: np.ndarray

    @classmethod
    def of(cls, caches: Sequence[TeacherRows], keys: np.ndarray) -> "Teaching":
        """Of samples by their ``keys`` ``[N, 16]``. A teacher of weight 0 teaches those that no other teacher does."""
        shards_KN = np.stack([cache.reader.shards_of(keys) for cache in caches])
        has_KN = shards_KN >= 0
        for number, cache in enumerate(caches):
            has_KN[number] &= ~_among(keys, cache.reader.rejected)
        weights_KN = has_KN * np.asarray([cache.weight for cache in caches], dtype=np.float64)[:, None]
        weights_KN = np.where(weights_KN.any(axis=0), weights_KN, has_KN)
        weights_KN /= np.maximum(weights_KN.sum(axis=0), np.finfo(np.float64).tiny)
        sizes = [cache.reader.plan.shards for cache in caches]
        return cls(weights_KN, shards_KN, np.cumsum([0, *sizes[:-1]]))

    def only(self, samples: np.ndarray) -> "Teaching":
        """That of some samples, by their indices."""
        return Teaching(self.weights_KN[:, samples], self.shards_KN[:, samples], self.first_shards_K)

    @property
    def taught(self) -> np.ndarray:
        """Which samples some teacher teaches, ``[N]`` of bool."""
        taught_N: np.ndarray = np.any(self.weights_KN > 0, axis=0)
        return taught_N

    @property
    def shard_of_sample(self) -> np.ndarray:
        """The shard of each sample in the first cache that teaches it, counted through all caches, ``[N]``."""
        number_N = (self.weights_KN > 0).argmax(axis=0)
        shard_N: np.ndarray = self.shards_KN[number_N, np.arange(len(number_N))] + self.first_shards_K[number_N]
        return shard_N

    def shards_of(self, positions: Sequence[int]) -> list[Sequence[int]]:
        """The shards of each cache that some samples need."""
        weights_KP, shards_KP = self.weights_KN[:, positions], self.shards_KN[:, positions]
        return [shards[weights > 0].tolist() for shards, weights in zip(shards_KP, weights_KP, strict=True)]

    def of_each(self, numbers: Sequence[int]) -> list[Sequence[int]]:
        """Shards that are counted through all caches, as those of each cache."""
        number_of = np.searchsorted(self.first_shards_K, numbers, side="right") - 1
        return [(np.asarray(numbers)[number_of == cache] - first).tolist() for cache, first in enumerate(self.first_shards_K)]

    def teachers_of(self, position: int) -> Iterator[tuple[int, float]]:
        """The number and the weight of each teacher of a sample."""
        weights_K = self.weights_KN[:, position]
        return ((number, float(weights_K[number])) for number in np.flatnonzero(weights_K).tolist())


def _among(keys: np.ndarray, rejected: Mapping[str, Rejected]) -> np.ndarray:
    """Which of ``keys`` ``[N, 16]`` are rejected, ``[N]`` of bool."""
    theirs = np.frombuffer(bytes.fromhex("".join(rejected)), np.uint8).reshape(-1, 16)
    ours, theirs = (np.ascontiguousarray(some).view("V16")[:, 0] for some in (keys, theirs))
    return np.isin(ours, theirs)


def why_missing(caches: Sequence[TeacherRows], key: str) -> str:
    """Why none of the caches has the row of a sample."""
    reasons = []
    for cache in caches:
        try:
            cache.reader.shard_of(key)
        except MissingRowError as error:
            reasons.append(str(error))
    assert reasons, "a row that is there was reported missing"
    return "; ".join(reasons)


def named(cache: TeacherRows, error: CacheError) -> CacheError:
    """An error about a row, with the name of its cache: where there are several, the row alone does not say it."""
    return type(error)(f"{cache.reader.url}: {error}")
