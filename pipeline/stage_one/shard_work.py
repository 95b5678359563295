"""The samples of a shard, grouped into batches under a budget of padded positions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from alignkd.cache_store.rows.row import Rejected, Row
from alignkd.inputs.batch import Batch, ModelInput
from alignkd.inputs.encoder import Planned
from alignkd.pipeline.data.preparer import Prepared
from alignkd.pipeline.data.sample import Sample
from alignkd.pipeline.stage_one.run_teacher import TeacherOutput


@dataclass(frozen=True)
class PlannedSample:
    """A sample whose text is prepared."""

    sample: Sample
    text: Planned

    @property
    def length(self) -> int:
        """Positions, vision tokens among them."""
        return self.text.length


@dataclass(frozen=True)
class ShardWork:
    """A shard laid out: batches of items under the token budget, and samples whose text cannot be used."""

    number: int
    batches: list[list[PlannedSample]]
    rejected: list[Rejected]


@dataclass(frozen=True)
class ReadyBatch:
    """A batch with its images, and the samples whose images cannot be used. ``batch`` is None when none is left."""

    items: list[tuple[PlannedSample, Prepared]]
    batch: Batch | None
    rejected: list[Rejected]

    @property
    def inputs(self) -> list[ModelInput]:
        """The model inputs, in order."""
        return [prepared.input for _, prepared in self.items]

    @property
    def positions(self) -> int:
        """Positions after padding."""
        return len(self.items) * max((item.length for item, _ in self.items), default=0)


def rows(ready: ReadyBatch, output: TeacherOutput) -> list[Row]:
    """The cache rows of a batch; waits for its output."""
    return [
        Row(item.sample.key, item.sample.id, prepared.image_sha256, values)
        for (item, prepared), values in zip(ready.items, output.values(), strict=True)
    ]


def batches(items: Sequence[PlannedSample], batch_tokens: int) -> Iterator[list[PlannedSample]]:
    """Group by length under a budget of padded positions, longest first; a pure function of the items."""
    current: list[PlannedSample] = []
    for item in sorted(items, key=lambda item: (-item.length, item.sample.key)):
        if current and (len(current) + 1) * current[0].length > batch_tokens:
            yield current
            current = []
        current.append(item)
    if current:
        yield current
