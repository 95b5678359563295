"""Samples to questions: read ahead by threads, their images through the tower once where a family takes its features.

Shapes: P patches, C tower width.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from alignkd.errors import SampleError
from alignkd.inputs.batch import ModelInput
from alignkd.models.vlm import Vlm
from alignkd.pipeline.data.contract import Samples
from alignkd.pipeline.data.preparer import Preparer
from alignkd.pipeline.data.rejected_samples import check_text
from alignkd.pipeline.data.sample import Sample
from alignkd.pipeline.data.tower_features import IMAGES_AT_ONCE

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


class Questions:
    """The questions of a data file for one model."""

    def __init__(self, vlm: Vlm, samples: Samples, preparer: Preparer) -> None:
        self.vlm, self.samples, self.preparer = vlm, samples, preparer

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

    def _read(self, pool: ThreadPoolExecutor, window: Sequence[int]) -> list[tuple[int, Sample, "Future[list[Any]]"]]:
        found, images = [], dict[tuple[tuple[str, ...], tuple[str, ...]], Future[list[Any]]]()
        for index in window:
            sample = self.samples[index]
            name = sample.images, sample.places
            if name not in images:
                images[name] = pool.submit(self._load, sample)
            found.append((index, sample, images[name]))
        return found

    def _load(self, sample: Sample) -> list[Any]:
        loaded, _ = self.preparer.load_images(self.preparer.places(sample))
        return loaded

    def _ready(self, reading: Sequence[tuple[int, Sample, "Future[list[Any]]"]]) -> tuple[list[Asked], list[Unanswerable]]:
        features = self._features([future for _, _, future in reading]) if self.vlm.caches_tower else {}
        asked, refused = [], []
        for index, sample, future in reading:
            try:
                check_text(sample)
                images = features.get(id(future)) or future.result()
                asked.append(Asked(index, sample, images, self._input(sample, images)))
            except SampleError as error:
                refused.append(Unanswerable(index, sample, str(error)))
        return asked, refused

    def _input(self, sample: Sample, images: Sequence[Any]) -> ModelInput:
        turns = (*turns_asked(sample), ("gpt", ""))
        if not self.vlm.caches_tower or len(images) != 1:
            return self.preparer.encoder.question(turns, images)
        # Questions about one picture share its features, uncopied: what they begin with is then computed once.
        made = self.preparer.encoder.question(turns, [replace(images[0], values=_NOTHING)])
        return replace(made, images=images[0].values[None])

    @torch.no_grad()
    def _features(self, futures: "Sequence[Future[list[Any]]]") -> dict[int, list[Any]]:
        """Features ``[P, C]`` of the images of each future that has some, by its identity."""
        usable = {id(future): future.result() for future in futures if future.exception() is None and future.result()}
        flat = [image for images in usable.values() for image in images]
        encoded = list[Any]()
        for start in range(0, len(flat), IMAGES_AT_ONCE):
            pixels = torch.stack([image.values for image in flat[start : start + IMAGES_AT_ONCE]]).to(self.vlm.device)
            encoded.extend(self.vlm.run_tower(pixels))
        made = iter([replace(image, values=values) for image, values in zip(flat, encoded, strict=True)])
        return {name: [next(made) for _ in images] for name, images in usable.items()}
