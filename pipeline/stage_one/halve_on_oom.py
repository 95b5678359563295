"""Run batches; one that does not fit into memory is halved, and the size that fits is remembered."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from alignkd.cache_store.rows.row import Rejected
from alignkd.errors import TransientError
from alignkd.pipeline.runtime.out_of_memory import is_out_of_memory
from alignkd.pipeline.runtime.retries import FIRST_PAUSE_S
from alignkd.pipeline.stage_one.run_teacher import TeacherOutput
from alignkd.pipeline.stage_one.shard_work import ReadyBatch
from alignkd.pipeline.stage_one.teacher_stage import StageOne

_ATTEMPTS = 3

_log = logging.getLogger(__name__)


@dataclass
class HalvingRunner:
    """Runs batches of a stage. ``limit``: the most padded positions a batch may have; None until one ran out of memory.

    ``fitted``: the most padded positions that were run so far. A sample that does not fit alone is at fault itself only where
    it is longer than that: memory that held as much before is in other hands.
    """

    stage: StageOne
    limit: int | None = None
    fitted: int = 0
    pause: Callable[[float], None] = time.sleep

    def run(self, ready: ReadyBatch) -> tuple[list[tuple[ReadyBatch, TeacherOutput]], list[Rejected]]:
        """Run a batch, in several parts where memory demands it. A sample that does not fit alone is rejected.

        Raises:
            TransientError: memory ran out for a sample no longer than others that fitted.
        """
        if ready.batch is None:
            return [], []
        if self.limit is not None and ready.positions > self.limit and len(ready.samples) > 1:
            return self._in_halves(ready)
        output = self._try(ready) if len(ready.samples) > 1 else self._try_alone(ready)
        if output is not None:
            self.fitted = max(self.fitted, ready.positions)
            return [(ready, output)], []
        if len(ready.samples) == 1:
            planned = ready.samples[0][0]
            if planned.length <= self.fitted:
                raise TransientError(
                    f"memory ran out for sample {planned.sample.id!r} of {planned.length} positions, though {self.fitted}"
                    " positions fitted before: another process holds the memory. Run the same command again when it is free"
                )
            reason = f"its {planned.length} positions do not fit into memory, even alone"
            return [], [Rejected(planned.sample.key, planned.sample.id, reason)]
        self.limit = min(self.limit or ready.positions, ready.positions // 2)
        _log.warning(
            "out of memory with %d samples, %d padded positions: the batch is halved, later ones are limited to %d positions",
            len(ready.samples),
            ready.positions,
            self.limit,
        )
        return self._in_halves(ready)

    def _try_alone(self, ready: ReadyBatch) -> TeacherOutput | None:
        """A sample alone is tried a few times: what fills the memory may be gone in a moment."""
        for attempt in range(_ATTEMPTS):
            if attempt:
                self.pause(FIRST_PAUSE_S * 3 ** (attempt - 1))
            if (output := self._try(ready)) is not None:
                return output
        return None

    def _try(self, ready: ReadyBatch) -> TeacherOutput | None:
        """None where memory ran out."""
        try:
            return self.stage.run(ready)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Outside the handler: while the error is alive, it keeps every tensor of the failed pass in memory.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _in_halves(self, ready: ReadyBatch) -> tuple[list[tuple[ReadyBatch, TeacherOutput]], list[Rejected]]:
        middle = len(ready.samples) // 2
        outputs, rejected = [], []
        for samples in (ready.samples[:middle], ready.samples[middle:]):
            part_outputs, part_rejected = self.run(ReadyBatch(samples, self.stage.collate(samples), []))
            outputs += part_outputs
            rejected += part_rejected
        return outputs, rejected
