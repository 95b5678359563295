"""A sample with a written answer as a record of LLaVA's format, with where the answer comes from."""

from collections.abc import Mapping, Sequence
from typing import Any

from alignkd.errors import SampleError
from alignkd.pipeline.answer.answering import Answer
from alignkd.pipeline.data.sample import Sample, read_sample
from alignkd.pipeline.evaluate.running.questions import turns_asked


def record_of(
    sample: Sample, answer: Answer, images: Sequence[str], provenance: Mapping[str, Any], *, several: bool
) -> dict[str, Any]:
    """The record. ``images``: its references. ``several``: there are more answers to the sample, so its id gets a number.

    Raises:
        SampleError: read again, it would not be this sample: the answer holds a tag that stands for an image.
    """
    turns = (*turns_asked(sample), ("gpt", answer.text))
    found: dict[str, Any] = {"id": f"{sample.id}#{answer.number + 1}" if several else sample.id}
    if images:
        found["image"] = images[0] if len(images) == 1 else list(images)
    found["conversations"] = [{"from": speaker, "value": text} for speaker, text in turns]
    found["provenance"] = {**provenance, "finished": answer.finished}
    try:
        read = read_sample(found)
    except SampleError as error:
        raise SampleError(f"with this answer it cannot be read again: {error}") from None
    if (read.turns, read.images) != (turns, tuple(images)):
        raise SampleError("with this answer it would be read otherwise: the answer holds a tag that stands for an image")
    return found
