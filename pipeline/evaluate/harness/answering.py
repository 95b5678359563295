"""Questions of another program, each with its own way of decoding, answered in batches and given back in their order."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from alignkd.errors import DataError, SampleError
from alignkd.inputs.batch import ModelInput
from alignkd.inputs.encoder import Encoder
from alignkd.inputs.prompts import IMAGE_TAG
from alignkd.models.encoders.pillow_rgb import rgb_by_pillow
from alignkd.models.encoders.templates.chat_template import check_date
from alignkd.models.vlm import Vlm
from alignkd.pipeline.config.shared import DEFAULT_MAX_LENGTH
from alignkd.pipeline.evaluate.decoding import Decoding, generate_ids


@dataclass(frozen=True)
class Asked:
    """One question: ``text`` as the program words it, what loads its pictures, and how it is answered.

    ``until``: texts of which the first that occurs ends the answer, and is no part of it. ``name``: what messages call it.
    """

    text: str
    pictures: Callable[[], Sequence[Any]]
    decoding: Decoding
    until: tuple[str, ...] = ()
    name: str = ""


def harness_encoder(vlm: Vlm, template: str | None, prompt_date: str | None) -> Encoder:
    """What makes prompts of questions: the encoder that ``evaluate`` uses.

    Raises:
        ConfigError: the model does not know the template.
    """
    encoder = vlm.encoder(template or vlm.default_template, DEFAULT_MAX_LENGTH)
    encoder.with_spans = False
    if prompt_date and encoder.prompt_date:
        encoder.prompt_date = check_date(prompt_date)
    return encoder


def answers(vlm: Vlm, encoder: Encoder, questions: Sequence[Asked], batch_size: int) -> Iterator[tuple[int, str]]:
    """The index and the answer of each question: not in their order, but each batch is of one way of decoding and like length.

    Raises:
        DataError: a question cannot be put to this model; it is named.
    """
    for batch in batches(questions, batch_size):
        made = [prepared(encoder, questions[index]) for index in batch]
        ids = generate_ids(vlm, made, questions[batch[0]].decoding)
        for index, found in zip(batch, ids, strict=True):
            yield index, cut(vlm.answer_text(found), questions[index].until)


def batches(questions: Sequence[Asked], batch_size: int) -> list[list[int]]:
    """Indices by decoding, the longest texts first, so that a batch that does not fit in memory is found at once."""
    groups = dict[Decoding, list[int]]()
    for index, question in enumerate(questions):
        groups.setdefault(question.decoding, []).append(index)
    made = []
    for group in groups.values():
        group.sort(key=lambda index: (-len(questions[index].text), index))
        made += [group[start : start + batch_size] for start in range(0, len(group), batch_size)]
    return made


def prepared(encoder: Encoder, question: Asked) -> ModelInput:
    """A question as the model takes it; pictures come first where its text does not place them.

    Raises:
        DataError: its prompt cannot be made, or what it shows is no picture, or a damaged one.
    """
    pictures, named = question.pictures(), question.text.count(IMAGE_TAG)
    if strange := [one for one in pictures if not isinstance(one, Image.Image)]:
        raise DataError(
            f"{question.name} shows {str(strange[0])[:80]!r}; expected pictures: alignkd reads neither video nor sound"
        )
    if pictures and named not in (0, len(pictures)):
        raise DataError(
            f"{question.name}: its text has {IMAGE_TAG} {named} times, and there are {len(pictures)} pictures; the numbers must"
            " be equal, or the text must leave it out"
        )
    before = "" if named else f"{IMAGE_TAG}\n" * len(pictures)
    decode = getattr(encoder, "decode", rgb_by_pillow)
    try:
        images = [encoder.load(decode(picture)) for picture in pictures]
        return encoder.question((("human", before + question.text), ("gpt", "")), images)
    except SampleError as error:
        raise DataError(f"{question.name} cannot be put to this model: {error}; try another template=") from error


def cut(text: str, until: Sequence[str]) -> str:
    """An answer up to the first of some texts."""
    ends = [text.index(end) for end in until if end and end in text]
    return text[: min(ends)].strip() if ends else text
