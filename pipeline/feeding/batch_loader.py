"""Micro-batches read ahead by worker processes, with the shards that later ones need opened in time."""

from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from alignkd.pipeline.feeding.dataset import Positions, TrainingSet
from alignkd.pipeline.feeding.order import SHARDS_OPEN
from alignkd.pipeline.runtime.signals import leave_signals_to_parent

BATCHES_AHEAD = 4
"""Micro-batches that each worker holds ready: enough for the moment in which new shards are opened."""


class _Announced(Sampler[list[int]]):
    """The same micro-batches, each with the shards of all that follow within half a window of samples.

    No more than half, so that two windows of shards are the most that a reader has to hold.
    """

    def __init__(self, batches: Sampler[list[int]], shard_of_sample: np.ndarray) -> None:
        self.batches, self.shard_of_sample = batches, shard_of_sample
        self.ahead = SHARDS_OPEN * len(shard_of_sample) // len(np.unique(shard_of_sample)) // 2

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[int]]:
        waiting, samples = deque[list[int]](), Counter[int]()
        for positions in self.batches:
            waiting.append(positions)
            samples.update(self._shards(positions))
            while samples.total() > self.ahead:
                yield self._announce(waiting.popleft(), samples)
        while waiting:
            yield self._announce(waiting.popleft(), samples)

    def _announce(self, positions: list[int], samples: Counter[int]) -> Positions:
        """Take a micro-batch out of the ``samples`` a shard that wait, and name the shards of the others."""
        samples -= Counter(self._shards(positions))
        return Positions(positions, list(samples))

    def _shards(self, positions: list[int]) -> list[int]:
        shards: list[int] = self.shard_of_sample[positions].tolist()
        return shards


class TrainingLoader(DataLoader[Any]):
    """Collated micro-batches, read ahead by processes, and taken from them by a thread while a step runs.

    Shards of the next window are opened during this one if the reader may hold both: ``max_shards`` of at least
    ``2 * SHARDS_OPEN``.

    Args:
        data: the samples.
        batches: positions in ``data`` of one micro-batch after the other; an empty list gives a batch of None.
        workers: processes; with 0 the one that trains reads each batch when it asks for it.
        pin_memory: batches come in page-locked memory.
        seed: of the workers; the random numbers of the run stay as they are, so that a resumed one has the same.
    """

    def __init__(
        self, data: TrainingSet, batches: Sampler[list[int]], *, workers: int, pin_memory: bool, seed: int = 0
    ) -> None:
        super().__init__(
            data,
            batch_sampler=_Announced(batches, data.shard_of_sample),
            collate_fn=data.collate,
            num_workers=workers,
            worker_init_fn=leave_signals_to_parent,
            prefetch_factor=BATCHES_AHEAD if workers else None,
            pin_memory=pin_memory,
            generator=torch.Generator().manual_seed(seed),
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        return _received(batches) if self.num_workers else batches


def _received(batches: Iterator[Any]) -> Iterator[Any]:
    """The same; the next one is being received while the last one is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="receive") as thread:
        coming = thread.submit(next, batches, None)
        while (received := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield received
