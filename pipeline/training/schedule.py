"""The steps of a run: how many there are, and the order that decides which samples each of them takes."""

from dataclasses import dataclass
from pathlib import Path

from alignkd.models.vlm import Vlm
from alignkd.pipeline.config.distill import DistillConfig
from alignkd.pipeline.feeding.dataset import TrainingSet
from alignkd.pipeline.feeding.lengths import check_budget, sample_lengths
from alignkd.pipeline.feeding.order import WINDOW_SHARDS, BatchOrder
from alignkd.pipeline.runtime.ranks import Worker


@dataclass(frozen=True)
class Schedule:
    """``steps`` steps of ``per_step`` micro-batches over all processes, taken from ``order`` one after the other."""

    order: BatchOrder
    steps: int
    per_step: int

    def epoch(self, step: int) -> float:
        """Passes over the data after a step."""
        epoch = 0
        while step > (steps := self.order.steps_per_epoch(epoch, self.per_step)):
            epoch, step = epoch + 1, step - steps
        return epoch + step / steps


def make_schedule(config: DistillConfig, data: TrainingSet, student: Vlm, process: Worker) -> Schedule:
    """The schedule of a configuration. Counts the length of every sample where batches depend on it.

    Raises:
        ConfigError: a sample that is longer than ``batch_tokens``.
    """
    lengths = None
    if config.group_by_length or config.batch_tokens is not None:
        show = process.rank == 0
        lengths = sample_lengths(data, student, Path(config.out), workers=config.workers or 0, show=show)
        if config.batch_tokens is not None:
            check_budget(data, lengths, config.batch_tokens)
    order = BatchOrder(
        data.shard_of_sample,
        seed=config.seed,
        window=WINDOW_SHARDS,
        batch_size=config.samples_at_once,
        lengths=lengths,
        group_by_length=config.group_by_length,
        batch_tokens=config.batch_tokens,
    )
    per_step = config.gradient_accumulation * process.world_size
    return Schedule(order, config.max_steps or order.total_steps(config.epochs, per_step), per_step)
