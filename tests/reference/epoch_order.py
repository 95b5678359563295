"""The order of an epoch, stated by itself: what the micro-batches of ``BatchOrder`` are cut from."""

import numpy as np


def epoch_order(shard_of_sample: np.ndarray, *, seed: int, epoch: int, window: int) -> np.ndarray:
    """A permutation of all samples for one epoch.

    Args:
        shard_of_sample: the shard of each sample's targets, ``[samples]``; all zero without a cache.
        seed: of the run.
        epoch: from 0.
        window: how many shards are mixed with each other at a time.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    shards = generator.permutation(np.unique(shard_of_sample)).tolist()
    windows = [set(shards[start : start + window]) for start in range(0, len(shards), window)]
    shuffled = generator.permutation(len(shard_of_sample))
    return np.concatenate([[i for i in shuffled if shard_of_sample[i] in shards_of] for shards_of in windows]).astype(np.int64)
