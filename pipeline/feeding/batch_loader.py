"""Micro-batches, read ahead by worker processes that also open the shards of later ones in time."""

from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from alignkd.pipeline.feeding.dataset import MicroBatchSamples, TrainingSet
from alignkd.pipeline.feeding.order import WINDOW_SHARDS
from alignkd.pipeline.runtime.signals import ignore_stop_signals

BATCHES_AHEAD = 4
"""Micro-batches that each worker keeps ready: enough for the time that opening new shards takes."""


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
    ``2 * WINDOW_SHARDS``.

    Args:
        data: the samples.
        batches: the samples of one micro-batch after the other, as indices into ``data``; an empty list gives a batch of None.
        workers: processes; with 0 the training process reads each batch when it asks for it.
        pin_memory: batches come in page-locked memory.
        seed: of the workers. The random state of the run does not change, so that a resumed run has the same.
    """

    def __init__(
        self, data: TrainingSet, batches: Sampler[list[int]], *, workers: int, pin_memory: bool, seed: int = 0
    ) -> None:
        super().__init__(
            data,
            batch_sampler=_WithUppendingShards(batches, data.shard_of_sample),
            collate_fn=data.collate,
            num_workers=workers,
            worker_init_fn=ignore_stop_signals,
            prefetch_factor=BATCHES_AHEAD if workers else None,
            pin_memory=pin_memory,
            generator=torch.Generator().manual_seed(seed),
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        return _receive_ahead(batches) if self.num_workers else batches


def _receive_ahead(batches: Iterator[Any]) -> Iterator[Any]:
    """The same batches; the next one is received while the last one is in use."""
    with ThreadPoolExecutor(1, thread_name_prefix="receive") as thread:
        pending = thread.submit(next, batches, None)
        while (received := pending.result()) is not None:
            pending = thread.submit(next, batches, None)
            yield received
