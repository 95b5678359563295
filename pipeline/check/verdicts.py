"""Whether a sample can be used: by its text and its images alone, or by a model's own encoder, as stage one judges it."""

from collections.abc import Callable
from dataclasses import dataclass

from alignkd.errors import SampleError
from alignkd.pipeline.check.image_facts import Facts
from alignkd.pipeline.data.rejected_samples import check_text
from alignkd.pipeline.data.sample import Sample


@dataclass(frozen=True)
class Verdict:
    """``length``: characters, or positions with a model. ``reason``: why the sample cannot be used, "" where it can;
    ``place``: of the image that is at fault."""

    length: int = 0
    reason: str = ""
    place: str = ""
    cut: bool = False


Judge = Callable[[Sample], Verdict]


@dataclass
class PlainJudge:
    """Without a model: what every family refuses. ``facts``: None where images are not read."""

    facts: Facts | None

    def __call__(self, sample: Sample) -> Verdict:
        """Judge a sample."""
        try:
            check_text(sample)
            check_turns(sample)
        except SampleError as error:
            return Verdict(reason=str(error))
        for place in sample.places if self.facts is not None else ():
            assert self.facts is not None
            if fault := self.facts.fault(place)[1]:
                return Verdict(reason=fault, place=place)
        return Verdict(sum(len(text) for _, text in sample.turns))


def check_turns(sample: Sample) -> None:
    """Refuse turns that no template takes.

    Raises:
        SampleError: they do not alternate, or hold no answer.
    """
    speakers = [speaker for speaker, text in sample.turns if speaker != "system" or text.strip()]
    start = 1 if speakers[:1] in (["gpt"], ["system"]) else 0  # LLaVA's own prompt leaves out a first turn of the assistant
    for number, speaker in enumerate(speakers[start:]):
        if speaker != ("human", "gpt")[number % 2]:
            raise SampleError(f"turn {number + start} is from {speaker!r}; turns must alternate human, gpt")
    if "gpt" not in speakers[start:]:
        raise SampleError("no turn is an answer: nothing is supervised")
