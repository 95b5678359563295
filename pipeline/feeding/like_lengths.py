"""Steps of samples of similar length, in an order that mixes lengths, and text with images, over the whole epoch.

A step takes samples that follow each other in length, so that all of its micro-batches, on whatever processes, need little
padding and like work. (transformers' ``LengthGroupedSampler`` and LLaVA's trainer group whole steps, too.) Which steps follow
each other is random but even: any eight in a row have about one of each eighth of the lengths.

Shapes: n samples, k shards.
"""

from collections.abc import Iterator

import numpy as np

_NOISE = 0.05
"""For grouping, each length is made up to this share shorter or longer, so that steps differ between epochs."""

_PARTS = 8
"""Parts of the lengths of a window, from short to long, whose steps alternate."""

_BATCH, _WORTH = 16, 1.1
"""Grouping pays where micro-batches of this many samples of any lengths take more than so many positions for a real one."""


def is_worth_grouping(lengths: np.ndarray) -> bool:
    """Whether lengths ``[n]`` differ enough: where they hardly do, steps of like length save little, but mix samples less.

    It depends on nothing but the lengths, so that the split of a step into micro-batches does not change its samples.
    """
    known = np.sort(lengths[lengths > 0])
    if not len(known):
        return False
    below = (np.arange(len(known) + 1) / len(known)) ** _BATCH
    longest: float = np.diff(below) @ known  # the mean of the longest of _BATCH samples
    return bool(longest > _WORTH * known.mean())


def deal_shards(shards: np.ndarray, text_only: np.ndarray, window: int, generator: np.random.Generator) -> np.ndarray:
    """The window of each of ``shards`` ``[k]``, which come in random order; ``text_only`` is their share of text-only samples.

    Each window gets at most ``window`` shards, and text in proportion: a data file may hold its text-only samples in one piece.
    """
    windows = -(-len(shards) // window)
    dealt = np.empty(len(shards), dtype=np.int64)
    by_share = np.argsort(text_only, kind="stable")
    for first in range(0, len(shards), windows):
        hand = by_share[first : first + windows]
        dealt[hand] = _evenly(windows, generator)[: len(hand)]
    return dealt


def _evenly(count: int, generator: np.random.Generator) -> np.ndarray:
    """A permutation in which any few neighbours are far apart: multiples of the golden ratio, from a random start."""
    places = (generator.random() + np.arange(count) * (5**0.5 - 1) / 2) % 1
    return np.argsort(np.argsort(places))


def noisy_lengths(lengths: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """What samples are sorted by, ``[n]``. One of unknown length (0) takes the length of another: it lands anywhere."""
    known = lengths[lengths > 0]
    if 0 < len(known) < len(lengths):
        lengths = np.where(lengths > 0, lengths, generator.choice(known, len(lengths)))
    return lengths * generator.uniform(1 - _NOISE, 1 + _NOISE, len(lengths))


def spread(count: int, generator: np.random.Generator) -> np.ndarray:
    """A random order of ``count`` things that are sorted by length, which takes turns among the parts of the lengths."""
    part = np.arange(count) * _PARTS // max(count, 1)
    place = np.empty(count)
    for number in np.unique(part):
        mine = np.flatnonzero(part == number)
        place[mine] = (generator.permutation(len(mine)) + generator.random(len(mine))) / len(mine)
    return np.argsort(place, kind="stable")


def steps_of_like_length(
    windows: np.ndarray, lengths: np.ndarray, size: int, generator: np.random.Generator
) -> Iterator[np.ndarray]:
    """The samples of each step, sorted by length, as indices; all steps but the last have ``size`` of them.

    ``windows``: the window of each sample, ``[n]``. The samples that a window has too many for whole steps are of similar
    length. They make a step with samples of the next window, which comes between the two: so no more windows are open.
    """
    sort_by = noisy_lengths(lengths, generator)
    order = np.lexsort((sort_by, windows))
    starts = np.flatnonzero(np.diff(windows[order], prepend=windows.min() - 1))
    left = np.empty(0, dtype=np.int64)
    for samples in np.split(order, starts[1:]):
        if len(left):
            taken = _nearest(samples, sort_by, sort_by[left].mean(), size - len(left))
            left = np.concatenate((left, samples[taken]))
            left = left[np.argsort(sort_by[left], kind="stable")]
            samples = np.delete(samples, np.arange(len(samples))[taken])
            if len(left) < size:
                continue
            yield left
        whole = len(samples) // size
        first = size * int(generator.integers(whole + 1))
        rest = slice(first, first + len(samples) % size)
        left = samples[rest]
        steps = np.delete(samples, np.arange(len(samples))[rest]).reshape(whole, size)
        yield from steps[spread(whole, generator)]
    if len(left):
        yield left


def _nearest(samples: np.ndarray, sort_by: np.ndarray, length: float, count: int) -> slice:
    """Up to ``count`` neighbours among sorted samples, around a length."""
    middle = int(np.searchsorted(sort_by[samples], length))
    first = min(max(middle - count // 2, 0), max(len(samples) - count, 0))
    return slice(first, first + count)
