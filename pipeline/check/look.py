"""One look at a range of samples, by any process: what they are, how they are judged, and where their images are.

Shapes: N samples of the range.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from alignkd.pipeline.check.image_facts import Decode, ImageFact, look_at
from alignkd.pipeline.check.tally import Named, Tally, kind_of
from alignkd.pipeline.check.verdicts import Judge
from alignkd.pipeline.data.contract import Samples
from alignkd.pipeline.data.sample import Sample

NO_WORDS = "an answer has no words"
Span = tuple[int, int]


@dataclass(frozen=True)
class Looked:
    """Tallies by the name of the source, and a hash of each sample's content without its id, uint64 ``[N]``."""

    tallies: dict[str, Tally]
    contents_N: np.ndarray


@dataclass
class SampleLook:
    """Judges samples, and counts what they are."""

    samples: Samples
    judge: Judge
    first: int

    def __call__(self, span: Span) -> Looked:
        """The samples from ``span[0]`` up to ``span[1]``."""
        tallies, contents = dict[str, Tally](), list[int]()
        for index in range(*span):
            sample = self.samples[index]
            tally = tallies.get(sample.source)
            if tally is None:
                tally = tallies[sample.source] = Tally(self.first)
            self._count(sample, tally)
            contents.append(content_hash(sample))
        return Looked(tallies, np.asarray(contents, dtype=np.uint64))

    def _count(self, sample: Sample, tally: Tally) -> None:
        name = sample.id or sample.key
        tally.samples += 1
        if not sample.fault or sample.turns:
            tally.turns[len(sample.turns)] += 1
            tally.images[len(sample.images)] += 1
            tally.system_turns += any(speaker == "system" for speaker, _ in sample.turns)
            tally.provenances[sample.provenance] += 1
        if sample.note:
            tally.read_otherwise.add(sample.note, Named(name, sample.note, sample.source))
        verdict = self.judge(sample)
        if verdict.reason:
            tally.rejected.add(kind_of(verdict.reason, verdict.place), Named(name, verdict.reason, sample.source))
            return
        tally.lengths.append(verdict.length)
        if any(speaker == "gpt" and not text.strip() for speaker, text in sample.turns):
            tally.read_otherwise.add(NO_WORDS, Named(name, NO_WORDS, sample.source))
        if verdict.cut:
            tally.cut.add("cut", Named(name, "cut", sample.source))


@dataclass
class PlaceLook:
    """Finds where the images of samples are."""

    samples: Samples

    def __call__(self, span: Span) -> list[str]:
        """The different places of the images of a range."""
        return list(dict.fromkeys(place for index in range(*span) for place in self.samples[index].places))


@dataclass
class ImageLook:
    """Reads images."""

    decode: Decode

    def __call__(self, places: list[str]) -> list[ImageFact]:
        """The facts about each."""
        return [look_at(place, self.decode) for place in places]


def content_hash(sample: Sample) -> int:
    """A hash of what a sample shows and says, whatever its id; of its key where it cannot be read."""
    parts = [sample.key] if sample.fault else [*sample.images, "", *(part for turn in sample.turns for part in turn)]
    # Lengths keep apart what has the same text with other borders.
    content = "\0".join([*parts, *(str(len(part)) for part in parts)])
    return int.from_bytes(hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def spans(count: int, size: int) -> Iterator[Span]:
    """Ranges of ``size`` samples that cover all of ``count``."""
    for start in range(0, count, size):
        yield start, min(start + size, count)
