"""The order of samples as a pure function of (seed, epoch, step), so that resuming is arithmetic.

1. Shards are shuffled, then samples within windows of a few shards: as random as a reader can serve from the few shards that
it keeps open. Samples with weights come as often as :mod:`alignkd.pipeline.feeding.draw` says. 2. Each epoch is cut into
steps, of samples of similar length unless that is switched off, and each step into micro-batches. 3. Each process takes its
micro-batches of a step. The number of processes does not change which samples a step learns from, and without a budget of
positions the size of a micro-batch does not either.
"""

import math
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from alignkd.pipeline.feeding.draw import draw
from alignkd.pipeline.feeding.like_lengths import deal_shards, is_worth_grouping, noisy_lengths, spread, steps_of_like_length

WINDOW_SHARDS = 8
"""Shards whose samples are mixed with each other; a reader keeps as many in memory."""


class BatchOrder:
    """Micro-batches of every epoch as a pure function of (seed, epoch).

    Args:
        shard_of_sample: the shard of each sample's targets, ``[samples]``; all zero without a cache.
        seed: of the run.
        window: how many shards are mixed with each other at a time.
        batch_size: samples of a micro-batch. With ``batch_tokens`` it is the maximum, and None means no maximum.
        per_step: micro-batches of a step, over all processes; an epoch's last step may have fewer.
        lengths: positions of each sample, ``[samples]``; 0 for one that will be rejected. The two arguments below need it.
        group_by_length: a step holds samples of similar length; with ``batch_tokens``, a micro-batch does. Where all lengths
            are similar, samples are not grouped.
        batch_tokens: maximum positions of a micro-batch after its samples are padded to the longest.
        text_only: which samples have no image, ``[samples]`` of bool; grouping spreads them over the epoch.
        weights: how often an epoch takes each sample, ``[samples]``, above 0; None for once each.
    """

    def __init__(
        self,
        shard_of_sample: np.ndarray,
        *,
        seed: int,
        window: int,
        batch_size: int | None,
        per_step: int = 1,
        lengths: np.ndarray | None = None,
        group_by_length: bool = False,
        batch_tokens: int | None = None,
        text_only: np.ndarray | None = None,
        weights: np.ndarray | None = None,
    ) -> None:
        assert batch_size is not None or batch_tokens is not None
        assert batch_size is None or batch_size > 0
        assert per_step > 0
        if group_by_length or batch_tokens is not None:
            assert lengths is not None
            assert len(lengths) == len(shard_of_sample)
        if batch_tokens is not None:
            assert lengths is not None
            assert lengths.max() <= batch_tokens, "lengths.check_budget names such samples before"
        self.per_step = per_step
        self._shards, self._seed, self._window = shard_of_sample, seed, window
        self._batch_size, self._batch_tokens = batch_size, batch_tokens
        self._lengths, self._text_only = lengths, text_only
        self._group_by_length = group_by_length and lengths is not None and is_worth_grouping(lengths)
        self._weights = weights
        self._counts: dict[int, int] = {}
        self._latest: tuple[int, list[np.ndarray]] | None = None

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """The samples of each micro-batch, as indices; every sample once, or as its weight says. The latest is kept."""
        if self._latest is None or self._latest[0] != epoch:
            self._latest = epoch, self._batches(epoch)
            self._counts[epoch] = len(self._latest[1])
        return self._latest[1]

    def steps_per_epoch(self, epoch: int) -> int:
        """Steps of an epoch; its last step may have fewer micro-batches."""
        return -(-self._batches_of(epoch) // self.per_step)

    def total_steps(self, epochs: float) -> int:
        """Steps of a number of epochs; a partial epoch is rounded up."""
        whole = int(epochs)
        steps = sum(self.steps_per_epoch(epoch) for epoch in range(whole))
        part = epochs - whole
        if not part:
            return steps
        # Rounded first: 1.1 - 1 is slightly more than 0.1 in floating point, and must not add a step.
        return steps + math.ceil(round(part * self.steps_per_epoch(whole), 6))

    def _batches_of(self, epoch: int) -> int:
        if self._batch_tokens is None:
            assert self._batch_size is not None
            return -(-self._drawn_of(epoch) // self._batch_size)
        if epoch not in self._counts:
            self.epoch(epoch)
        return self._counts[epoch]

    def _drawn_of(self, epoch: int) -> int:
        return len(self._shards) if self._weights is None else len(draw(self._weights, self._seed, epoch))

    def _batches(self, epoch: int) -> list[np.ndarray]:
        if self._weights is not None:
            drawn = draw(self._weights, self._seed, epoch)
            return [drawn[batch] for batch in self._of(drawn)._batches(epoch)]
        generator = np.random.Generator(np.random.Philox(key=[self._seed, epoch]))
        order, windows = self._shuffle(generator)
        if not self._group_by_length:
            return np.split(order, self._cuts(order, np.zeros_like(windows)))
        assert self._lengths is not None
        if self._batch_tokens is not None:
            return self._budget_batches(order, windows, generator)
        assert self._batch_size is not None
        size = self._batch_size
        steps = steps_of_like_length(windows, self._lengths[order], size * self.per_step, generator)
        return [step[first : first + size] for step in map(order.__getitem__, steps) for first in range(0, len(step), size)]

    def _of(self, drawn: np.ndarray) -> "BatchOrder":
        """The order of the samples that an epoch draws, each as often as it is drawn."""
        return BatchOrder(
            self._shards[drawn],
            seed=self._seed,
            window=self._window,
            batch_size=self._batch_size,
            per_step=self.per_step,
            lengths=None if self._lengths is None else self._lengths[drawn],
            group_by_length=self._group_by_length,
            batch_tokens=self._batch_tokens,
            text_only=None if self._text_only is None else self._text_only[drawn],
        )

    def _shuffle(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """All samples in their order, and the window of each, which never decreases."""
        shards = generator.permutation(np.unique(self._shards))
        window_of_shard = np.arange(len(shards)) // self._window
        if self._group_by_length and self._text_only is not None:
            text, samples = (np.bincount(self._shards, weights)[shards] for weights in (self._text_only, None))
            window_of_shard = deal_shards(shards, text / samples, self._window, generator)
        rank = np.empty(int(shards.max()) + 1, dtype=np.int64)
        rank[shards] = window_of_shard
        shuffled = generator.permutation(len(self._shards))
        order = shuffled[np.argsort(rank[self._shards[shuffled]], kind="stable")]
        return order, rank[self._shards[order]]

    def _budget_batches(self, order: np.ndarray, windows: np.ndarray, generator: np.random.Generator) -> list[np.ndarray]:
        """Micro-batches of similar lengths within a budget; none has samples of two windows. They are of like work anyway."""
        assert self._lengths is not None
        order = order[np.lexsort((noisy_lengths(self._lengths[order], generator), windows))]
        cuts = self._cuts(order, windows)
        batches, window_of_batch = np.split(order, cuts), windows[np.r_[0, cuts]]
        found: list[np.ndarray] = []
        for window in np.unique(window_of_batch):
            mine = np.flatnonzero(window_of_batch == window)
            found += [batches[i] for i in mine[spread(len(mine), generator)]]
        return found

    def _cuts(self, order: np.ndarray, windows: np.ndarray) -> np.ndarray:
        """Where each micro-batch after the first begins within ``order``; with a budget, none crosses the end of a window."""
        if self._batch_tokens is None:
            assert self._batch_size is not None
            return np.arange(self._batch_size, len(order), self._batch_size)
        assert self._lengths is not None
        return _budget_cuts(self._lengths[order], windows, self._batch_tokens, self._batch_size or len(order))


def _budget_cuts(lengths: np.ndarray, windows: np.ndarray, budget: int, most: int) -> np.ndarray:
    """Where micro-batches must begin so that none holds more than ``budget`` padded positions, or ``most`` samples."""
    cuts, samples, longest, window = [], 0, 0, windows[0]
    # A sample that will be rejected counts as one position, so that a micro-batch of them has an end, too.
    for i, (length, inside) in enumerate(zip(np.maximum(lengths, 1).tolist(), windows.tolist(), strict=True)):
        samples, longest = samples + 1, max(longest, length)
        if samples > most or samples * longest > budget or inside != window:
            cuts.append(i)
            samples, longest, window = 1, length, inside
    return np.asarray(cuts, dtype=np.int64)


class StepSampler(Sampler[list[int]]):
    """What one process reads: ``accumulation`` micro-batches in each step, from ``start_step`` on.

    A step takes the next ``world_size * accumulation`` micro-batches of its epoch. The j-th micro-batch of process ``rank`` is
    number ``j * world_size + rank`` of them: those that run at the same time have like lengths. An epoch's last step may have
    fewer: each missing one is an empty list.

    ``len`` is that of the whole run, wherever it starts.
    """

    def __init__(
        self, order: BatchOrder, *, steps: int, world_size: int, rank: int, accumulation: int, start_step: int = 0
    ) -> None:
        assert 0 <= rank < world_size
        assert world_size * accumulation == order.per_step
        assert 0 <= start_step <= steps
        self.order, self.steps, self.start_step = order, steps, start_step
        self.world_size, self.rank, self.accumulation = world_size, rank, accumulation

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        per_step = self.order.per_step
        epoch = before = 0
        while before < self.steps:
            after = before + self.order.steps_per_epoch(epoch)
            if after > self.start_step:
                batches = self.order.epoch(epoch)
                for step in range(max(self.start_step, before), min(after, self.steps)):
                    first = (step - before) * per_step
                    mine = range(first + self.rank, first + per_step, self.world_size)
                    yield from (batches[i].tolist() if i < len(batches) else [] for i in mine)
            epoch, before = epoch + 1, after
