"""Samples to questions: read ahead by threads, their images through the tower once where a family takes its features.

Shapes: P patches, C tower width.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from alignkd.errors import SampleError
from alignkd.inputs.batch import ModelInput
from alignkd.models.vlm import Vlm
from alignkd.pipeline.data.contract import Samples
from alignkd.pipeline.data.preparer import Preparer, memory_for
from alignkd.pipeline.data.rejected_samples import check_text
from alignkd.pipeline.data.sample import Sample
from alignkd.pipeline.data.tower_features import IMAGES_AT_ONCE

Turns = Callable[[Sample], Sequence[tuple[str, str]]]
_READERS = 4
_NOTHING = torch.zeros(0)


@dataclass(frozen=True)
class Asked:
    """A sample as a question: sample ``index``, its turns up to the answer, its images as the encoder takes them."""

    index: int
    sample: Sample
    images: Sequence[Any]
    input: ModelInput

    @property
    def asked(self) -> tuple[tuple[str, str], ...]:
        """The turns before the answer."""
        return turns_asked(self.sample)


@dataclass(frozen=True)
class Unanswerable:
    """A sample that cannot be put to the model, and why."""

    index: int
    sample: Sample
    reason: str


def turns_asked(sample: Sample) -> tuple[tuple[str, str], ...]:
    """The turns of a sample up to where its last answer begins; all of them, where the user has the last word."""
    return sample.turns[:-1] if sample.turns and sample.turns[-1][0] == "gpt" else sample.turns


def with_any_answer(sample: Sample) -> tuple[tuple[str, str], ...]:
    """The turns of a sample that is asked whoever has the last word, ended by an answer."""
    return (*turns_asked(sample), ("gpt", ""))


class Questions:
    """The questions of a data file for one model. ``turns``: of a sample, of which the last is the answer that is asked for."""

    def __init__(self, vlm: Vlm, samples: Samples, preparer: Preparer, turns: Turns = with_any_answer) -> None:
        self.vlm, self.samples, self.preparer, self.turns = vlm, samples, preparer, turns

    def windows(self, windows: Iterable[Sequence[int]]) -> Iterator[tuple[list[Asked], list[Unanswerable]]]:
        """The questions of each window of indices; while one is worked on, the next one is read."""
        with ThreadPoolExecutor(_READERS, thread_name_prefix="questions") as pool:
            ahead = iter(windows)
            try:
                reading = self._read(pool, next(ahead, ()))
                while reading:
                    ready = self._ready(reading)
                    reading = self._read(pool, next(ahead, ()))
                    yield ready
            finally:
                pool.shutdown(cancel_futures=True)

    def _read(self, pool: ThreadPoolExecutor, window: Sequence[int]) -> list["_Reading"]:
        found, images = list[_Reading](), dict[str, Future[Any]]()
        for index in window:
            sample = self.samples[index]
            try:
                places = self.preparer.places(sample)
            except SampleError as error:
                found.append(_Reading(index, sample, str(error)))
                continue
            for place in places:
                if place not in images:
                    images[place] = pool.submit(self._load, sample, place)
            found.append(_Reading(index, sample, "", [images[place] for place in places]))
        return found

    def _load(self, sample: Sample, place: str) -> Any:
        with memory_for(sample):
            (loaded,), _ = self.preparer.load_images((place,))
        return loaded

    def _ready(self, reading: Sequence["_Reading"]) -> tuple[list[Asked], list[Unanswerable]]:
        futures = list(dict.fromkeys(image for one in reading for image in one.images))
        features = self._features(futures) if self.vlm.caches_tower else {}
        asked, refused, known = [], [], dict[Any, ModelInput]()
        for number, sample, fault, waiting in reading:
            try:
                check_text(sample)
                if fault:
                    raise SampleError(fault)
                images = [features[image] if image in features else image.result() for image in waiting]
                asked.append(Asked(number, sample, images, self._input(sample, images, known)))
            except SampleError as error:
                refused.append(Unanswerable(number, sample, str(error)))
        return asked, refused

    def _input(self, sample: Sample, images: Sequence[Any], known: dict[Any, ModelInput]) -> ModelInput:
        turns = self.turns(sample)
        if not self.vlm.caches_tower or len(images) != 1:
            return self.preparer.encoder.question(turns, images)
        # Questions about one picture share its features, uncopied: what they begin with is then computed once. Those of one
        # wording share their ids, which depend on the turns and the size of the picture alone.
        prompt = tuple(map(tuple, turns)), images[0].size
        if prompt not in known:
            known[prompt] = self.preparer.encoder.question(turns, [replace(images[0], values=_NOTHING)])
        return replace(known[prompt], images=images[0].values[None])

    @torch.no_grad()
    def _features(self, futures: "Sequence[Future[Any]]") -> "dict[Future[Any], Any]":
        """Each image that could be read, with its features ``[P, C]``."""
        usable = [future for future in futures if future.exception() is None]
        found = dict[Future[Any], Any]()
        for start in range(0, len(usable), IMAGES_AT_ONCE):
            some = usable[start : start + IMAGES_AT_ONCE]
            pixels = torch.stack([image.result().values for image in some]).to(self.vlm.device)
            encoded = self.vlm.run_tower(pixels)
            found |= {image: replace(image.result(), values=values) for image, values in zip(some, encoded, strict=True)}
        return found


class _Reading(NamedTuple):
    """A sample whose images are being read; ``fault``: why they cannot be."""

    number: int
    sample: Sample
    fault: str
    images: "Sequence[Future[Any]]" = ()
