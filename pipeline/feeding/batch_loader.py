"""Micro-batches, read ahead by worker processes that also open the shards of later ones in time."""

from collections import Counter, deque
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from alignkd.pipeline.feeding.dataset import MicroBatchSamples, TrainingSet
from alignkd.pipeline.feeding.loader_processes import Collate, SampleSource, begin_loader, end_at_exit, receive_ahead
from alignkd.pipeline.feeding.order import WINDOW_SHARDS

BATCHES_AHEAD = 4
"""Micro-batches that each worker keeps ready: enough for the time that opening new shards takes."""

LONGEST_WAIT_S = 1800.0
"""Seconds; how long a batch may take before its loader processes count as lost."""


class _WithUppendingShards(Sampler[list[int]]):
    """The micro-batches of a sampler, each with the shards of those that follow within half a window of samples.

    Half a window at most, so that a reader never has to hold more than two windows of shards.
    """

    def __init__(self, batches: Sampler[list[int]], shard_of_sample: np.ndarray) -> None:
        self.batches, self.shard_of_sample = batches, shard_of_sample
        self.ahead = WINDOW_SHARDS * len(shard_of_sample) // len(np.unique(shard_of_sample)) // 2

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[int]]:
        waiting, samples = deque[list[int]](), Counter[int]()
        for positions in self.batches:
            waiting.append(positions)
            samples.update(self._shards(positions))
            while samples.total() > self.ahead:
                yield self._take(waiting.popleft(), samples)
        while waiting:
            yield self._take(waiting.popleft(), samples)

    def _take(self, positions: list[int], samples: Counter[int]) -> MicroBatchSamples:
        """Take a micro-batch out of ``samples``, the waiting samples of each shard, and name the shards of the others."""
        samples -= Counter(self._shards(positions))
        return MicroBatchSamples(positions, list(samples))

    def _shards(self, positions: list[int]) -> list[int]:
        shards: list[int] = self.shard_of_sample[positions].tolist()
        return shards


class TrainingLoader(DataLoader[Any]):
    """Collated micro-batches; processes read them ahead, and a thread receives the next one while a step runs.

    Shards of the next window are opened during this one if the reader may hold both: if its ``max_shards`` is at least
    ``2 * WINDOW_SHARDS``. Whoever stops before the last batch calls :meth:`close`, so that no process is left.

    Args:
        data: the samples.
        batches: the samples of one micro-batch after the other, as indices into ``data``; an empty list gives a batch of None.
        workers: processes; with 0 the training process reads each batch when it asks for it.
        pin_memory: batches come in page-locked memory.
        seed: of the workers. The random state of the run does not change, so that a resumed run has the same.
        longest_wait_s: how long a batch may take before its loader processes count as lost.

    Raises (while batches are taken):
        TransientError: a loader process was killed, or does not answer.
    """

    def __init__(
        self,
        data: TrainingSet,
        batches: Sampler[list[int]],
        *,
        workers: int,
        pin_memory: bool,
        seed: int = 0,
        longest_wait_s: float = LONGEST_WAIT_S,
    ) -> None:
        super().__init__(
            SampleSource(data) if workers else data,
            batch_sampler=_WithUppendingShards(batches, data.shard_of_sample),
            collate_fn=Collate(data.collate) if workers else data.collate,
            num_workers=workers,
            worker_init_fn=begin_loader,
            prefetch_factor=BATCHES_AHEAD if workers else None,
            pin_memory=pin_memory,
            generator=torch.Generator().manual_seed(seed),
        )
        # DataLoader refuses new attributes of some names, not these.
        self._longest_wait_s = longest_wait_s
        self._received: list[Generator[Any, None, None]] = []

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        if not self.num_workers:
            return batches
        end_at_exit(batches)
        received = receive_ahead(batches, self._longest_wait_s)
        self._received.append(received)
        return received

    def close(self) -> None:
        """End the loader processes at once, whatever they are doing. The loader may be used again."""
        while self._received:
            self._received.pop().close()
