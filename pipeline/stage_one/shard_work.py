"""The samples of a shard, grouped into batches under a budget of padded positions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from alignkd.cache_store.rows.row import Rejected, Row
from alignkd.inputs.batch import Batch, ModelInput
from alignkd.inputs.encoder import Planned
from alignkd.pipeline.data.preparer import Prepared
from alignkd.pipeline.data.sample import Sample
from alignkd.pipeline.stage_one.finite import REASON
from alignkd.pipeline.stage_one.run_teacher import TeacherOutput


@dataclass(frozen=True)
class PlannedSample:
    """A sample whose text is prepared."""

    sample: Sample
    text: Planned

    @property
    def length(self) -> int:
        """Positions, vision tokens included."""
        return self.text.length


@dataclass(frozen=True)
class ShardWork:
    """A shard's samples in batches under the token budget, and those whose text cannot be used."""

    number: int
    batches: list[list[PlannedSample]]
    rejected: list[Rejected]


@dataclass(frozen=True)
class ReadyBatch:
    """A batch with its images, and the samples whose images cannot be used. ``batch`` is None where no sample is left."""

    samples: list[tuple[PlannedSample, Prepared]]
    batch: Batch | None
    rejected: list[Rejected]

    @property
    def inputs(self) -> list[ModelInput]:
        """The model inputs of its samples, in order."""
        return [prepared.input for _, prepared in self.samples]

    @property
    def positions(self) -> int:
        """Positions after padding."""
        return len(self.samples) * max((planned.length for planned, _ in self.samples), default=0)

    @property
    def truncated(self) -> int:
        """Samples whose text was cut off at the maximum length."""
        return sum(prepared.truncated for _, prepared in self.samples)


def rows(ready: ReadyBatch, output: TeacherOutput) -> list[Row]:
    """The cache rows of a batch, without the samples of :func:`not_finite`; waits until its output is on the host."""
    return [
        Row(planned.sample.key, planned.sample.id, prepared.image_sha256, values)
        for (planned, prepared), values, finite in zip(ready.samples, output.values(), output.finite_samples(), strict=True)
        if finite
    ]


def not_finite(ready: ReadyBatch, output: TeacherOutput) -> list[Rejected]:
    """The samples of a batch for which the teacher gave NaN or infinity; waits until its output is on the host."""
    return [
        Rejected(planned.sample.key, planned.sample.id, REASON)
        for (planned, _), finite in zip(ready.samples, output.finite_samples(), strict=True)
        if not finite
    ]


def batches(samples: Sequence[PlannedSample], batch_tokens: int) -> Iterator[list[PlannedSample]]:
    """Group samples of similar length under a budget of padded positions, longest first.

    The batches do not depend on the order of the samples.
    """
    current: list[PlannedSample] = []
    for planned in sorted(samples, key=lambda planned: (-planned.length, planned.sample.key)):
        if current and (len(current) + 1) * current[0].length > batch_tokens:
            yield current
            current = []
        current.append(planned)
    if current:
        yield current
