"""What is answered by which process, and in which order: windows of samples, those about one image one after the other."""

import math
from collections.abc import Iterator

import numpy as np

from alignkd.pipeline.data.contract import Samples
from alignkd.pipeline.runtime.ranks import Worker

MOST_OF_FEATURES, MOST_OF_PIXELS = 256, 128
"""Most answers of a window: where images become features of a tower, and where each question has its own pixel values."""
_LEAST_WINDOWS, _LEAST = 16, 8


class Work:
    """The windows of a data file. They depend on its samples alone, never on processes or on what is done already.

    Identical samples are answered once: ``first`` has, for each sample, the index of the first that is like it.
    """

    def __init__(self, samples: Samples, answers: int, most: int) -> None:
        self.order = samples.by_image()
        names = np.ascontiguousarray(samples.keys).view("S16").ravel()
        _, first, of = np.unique(names, return_index=True, return_inverse=True)
        self.first: np.ndarray = first[of]
        size = min(max(math.ceil(len(self.order) / _LEAST_WINDOWS), _LEAST), max(most // answers, 1))
        self.windows = [self.order[start : start + size] for start in range(0, len(self.order), size)]

    def share_of(self, worker: Worker) -> Iterator[list[int]]:
        """The windows of one process, as indices of samples."""
        return (self.windows[number].tolist() for number in range(worker.rank, len(self.windows), worker.world_size))
