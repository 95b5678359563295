"""The order of samples as a pure function of (seed, epoch, position), so that resuming is arithmetic.

Shards are shuffled, then samples within windows of a few shards: as random as a reader can serve from the few shards it
keeps open.
"""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


def epoch_order(shard_of_sample: np.ndarray, *, seed: int, epoch: int, window: int) -> np.ndarray:
    """A permutation of all samples for one epoch.

    Args:
        shard_of_sample: the shard each sample's targets lie in, ``[samples]``; all zero without a cache.
        seed: of the run.
        epoch: from 0.
        window: shards mixed with each other at a time.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    shards = generator.permutation(np.unique(shard_of_sample))
    rank = np.empty(int(shards.max()) + 1, dtype=np.int64)
    rank[shards] = np.arange(len(shards)) // window
    shuffled = generator.permutation(len(shard_of_sample))
    return shuffled[np.argsort(rank[shard_of_sample[shuffled]], kind="stable")]


class EpochSampler(Sampler[int]):
    """Feeds :func:`epoch_order` to a DataLoader; the Trainer sets the epoch."""

    def __init__(self, shard_of_sample: np.ndarray, *, seed: int, window: int) -> None:
        self._shards, self._seed, self._window = shard_of_sample, seed, window
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._shards)

    def __iter__(self) -> Iterator[int]:
        return iter(epoch_order(self._shards, seed=self._seed, epoch=self.epoch, window=self._window).tolist())
