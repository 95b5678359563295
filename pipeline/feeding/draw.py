"""Which samples an epoch takes, and how often, where they have weights: a pure function of (seed, epoch)."""

import math

import numpy as np


def draw(weights: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The samples of an epoch, as indices in their order, each as often as its weight says: a pure function.

    A sample of weight 2.3 comes twice, and in three of ten epochs once more: the samples of one weight take turns, in an order
    that the seed gives, so that over any number of epochs no sample comes more than once more often than another of its weight.
    """
    times = np.floor(weights).astype(np.int64)
    for number, weight in enumerate(np.unique(weights).tolist()):
        rest = weight - math.floor(weight)
        if rest:
            mine = np.flatnonzero(weights == weight)
            turns = np.random.Generator(np.random.Philox(key=[seed, (1 << 62) + number])).permutation(mine)
            first, last = (math.floor(round(at * rest * len(mine), 6)) for at in (epoch, epoch + 1))
            times[turns[np.arange(first, last) % len(mine)]] += 1
    if not times.any():  # weights so small that this epoch has no turn
        times[epoch % len(times)] = 1
    return np.repeat(np.arange(len(weights)), times)
