"""Batches that fit into memory: one that does not is halved, and the size that fits is remembered."""

from dataclasses import dataclass

import torch

from alignkd.cache_store.rows.row import Rejected
from alignkd.pipeline.runtime.out_of_memory import is_out_of_memory
from alignkd.pipeline.stage_one.run_teacher import TeacherOutput
from alignkd.pipeline.stage_one.shard_work import ReadyBatch
from alignkd.pipeline.stage_one.teacher_stage import StageOne


@dataclass
class HalvingRunner:
    """Runs batches of a stage; ``limit`` is the most positions that are known to fit once something did not."""

    stage: StageOne
    limit: int | None = None

    def run(self, ready: ReadyBatch) -> tuple[list[tuple[ReadyBatch, TeacherOutput]], list[Rejected]]:
        """Run a batch, in parts where it must be; a sample that does not fit alone is rejected by name."""
        if ready.batch is None:
            return [], []
        if self.limit is not None and ready.positions > self.limit and len(ready.items) > 1:
            return self._in_halves(ready)
        output = self._try(ready)
        if output is not None:
            return [(ready, output)], []
        if len(ready.items) == 1:
            item = ready.items[0][0]
            reason = f"its {item.length} positions do not fit into memory, even alone"
            return [], [Rejected(item.sample.key, item.sample.id, reason)]
        self.limit = min(self.limit or ready.positions, ready.positions // 2)
        return self._in_halves(ready)

    def _try(self, ready: ReadyBatch) -> TeacherOutput | None:
        try:
            return self.stage.run(ready)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Here, not above: the error holds on to every tensor of the pass that failed.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _in_halves(self, ready: ReadyBatch) -> tuple[list[tuple[ReadyBatch, TeacherOutput]], list[Rejected]]:
        middle = len(ready.items) // 2
        outputs, rejected = [], []
        for items in (ready.items[:middle], ready.items[middle:]):
            done, refused = self.run(ReadyBatch(items, self.stage.collate(items), []))
            outputs += done
            rejected += refused
        return outputs, rejected
