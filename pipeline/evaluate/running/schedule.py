"""Which questions are answered by which process, and in which order: those about one picture follow each other."""

import heapq
from collections.abc import Iterable, Iterator, Sequence

from alignkd.pipeline.evaluate.benchmarks.contract import Question
from alignkd.pipeline.runtime.ranks import Worker

WINDOW = 1024, 256
"""Questions and pictures of a window, which are prepared together, before the next pictures are needed. 256 pictures of
336 x 336 pixels take 0.35 GB in float32 while they are read ahead, their features from a large CLIP tower 0.6 GB."""

WINDOW_OF_PIXELS = 128, 32
"""The same where each question has its own copy of pixel values, of up to several megabytes."""

ANSWER_TOKENS = 128
"""Tokens of an answer that a batch leaves room for, if as many are allowed. Nearly all answers are shorter."""

Group = tuple[int, ...]
"""Indices of questions that share their first picture; one question, where it has none."""


def groups_by_picture(questions: Sequence[Question], indices: Iterable[int]) -> list[Group]:
    """Indices by first picture, in the order in which pictures are first asked about."""
    groups: dict[str | int, list[int]] = {}
    for index in indices:
        images = questions[index].images
        groups.setdefault(images[0] if images else index, []).append(index)
    return [tuple(group) for group in groups.values()]


def share_of(questions: Sequence[Question], worker: Worker) -> list[int]:
    """Indices that a process answers: whole pictures, and about as many questions as every other process.

    It depends on the questions and the number of processes alone, so that processes need not agree on what is still to do.
    """
    loads = [(0, rank) for rank in range(worker.world_size)]
    own = list[int]()
    for group in groups_by_picture(questions, range(len(questions))):
        load, rank = heapq.heappop(loads)
        heapq.heappush(loads, (load + len(group), rank))
        if rank == worker.rank:
            own.extend(group)
    return own


def windows(groups: Sequence[Group], most_questions: int, most_pictures: int) -> Iterator[list[int]]:
    """Groups one after the other, in pieces of limited size; no group is split."""
    window, pictures = list[int](), 0
    for group in groups:
        if window and (len(window) + len(group) > most_questions or pictures == most_pictures):
            yield window
            window, pictures = [], 0
        window.extend(group)
        pictures += 1
    if window:
        yield window


def like_length_batches(lengths: Sequence[int], new_tokens: int, batch_tokens: int, most: int | None = None) -> list[list[int]]:
    """Positions in ``lengths`` in batches, the longest first.

    A batch takes as many as fit into ``batch_tokens``, each counted as the longest of them and its answer; one at least, and
    ``most`` at most.
    """
    room = min(new_tokens, ANSWER_TOKENS)
    batches, longest = list[list[int]](), 0
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        count = len(batches[-1]) + 1 if batches else 0
        if batches and (longest + room) * count <= batch_tokens and (most is None or count <= most):
            batches[-1].append(place)
        else:
            batches.append([place])
            longest = lengths[place]
    return batches
