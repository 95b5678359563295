"""Who wrote the answers of samples, of any reader; and the samples whose answers a job takes."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from alignkd.errors import DataError
from alignkd.pipeline.data.contract import Authors, Samples
from alignkd.pipeline.data.provenance import AnswerChoice, Author

_NAMED = 5


def authors_of(samples: Samples) -> Authors:
    """Who wrote each sample's answers: from the reader's index or, where it keeps none, from every sample."""
    if samples.authors is not None:
        return samples.authors
    numbers = dict[Author, int]()
    found = np.empty(len(samples), dtype=np.int32)
    for index in range(len(samples)):
        found[index] = numbers.setdefault(samples[index].author, len(numbers))
    return Authors(tuple(numbers), found)


def joined(parts: Sequence[Samples], order: np.ndarray) -> Authors | None:
    """Those of several samples one after the other, in this order; None where one keeps none."""
    numbers, found = dict[Author, int](), list[np.ndarray]()
    for part in parts:
        if part.authors is None:
            return None
        own = [numbers.setdefault(author, len(numbers)) for author in part.authors.names]
        found.append(np.asarray(own, dtype=np.int32)[part.authors.number_of])
    return Authors(tuple(numbers), np.concatenate(found)[order])


def taken_by(samples: Samples, choices: Sequence[AnswerChoice]) -> np.ndarray:
    """Which samples one of these choices takes, ``[N]`` of bool."""
    if any(choice.answers == "both" for choice in choices):
        return np.ones(len(samples), dtype=bool)
    authors = authors_of(samples)
    taken = [any(choice.takes(author) for choice in choices) for author in authors.names]
    found: np.ndarray = np.asarray(taken, dtype=bool)[authors.number_of]
    return found


def chosen_samples(samples: Samples, choice: AnswerChoice) -> Samples:
    """The samples whose answers are chosen.

    Raises:
        DataError: there are none; says whose answers there are.
    """
    taken = taken_by(samples, [choice])
    if taken.all():
        return samples
    if taken.any():
        return samples.select(np.flatnonzero(taken))
    authors = authors_of(samples)
    counts = Counter(authors.number_of.tolist()).most_common(_NAMED)
    there = ", ".join(f"{authors.names[number]}: {count:,}" for number, count in counts)
    if choice.answers == "data":
        raise DataError(
            f"--answers data: none of the {len(samples):,} samples of {samples.path} has an answer of the data itself; they"
            f" were written by {there}. Give --answers teacher or both, or other --data"
        )
    raise DataError(
        f"--answers teacher: none of the {len(samples):,} samples of {samples.path} has an answer of this teacher (weights"
        f" {choice.weights[:12]}); they were written by {there}. A digest is that of weights in the dtype they are loaded"
        " in: give the --dtype that alignkd answer was given; or --answers both, which takes everything"
    )
