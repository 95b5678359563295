"""Conversations to token ids and labels, exactly as MobileVLM V2's training code makes them.

1. ``<image>`` moves to the front of its turn; 2. the template joins the turns; 3. text between images is tokenised piece
by piece, and each image is one placeholder id; 4. everything except the answers is masked with -100.

Source: ``preprocess_multimodal``, ``preprocess_plain``, ``preprocess_v1`` and ``tokenizer_image_token`` of the reference
training code (after LLaVA's). Their quirks are kept, since a model trained with them expects them; the golden tests compare
the ids. Two differences: a turn with several ``<image>`` keeps them all, where the reference keeps one; and the text of a
system turn takes the place of the system text of ``v1``, where the reference knows no system turns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from alignkd.errors import ConfigError, SampleError

Template = Literal["v1", "plain"]
TEMPLATES: tuple[str, ...] = get_args(Template)

IMAGE_TOKEN_ID = -200
"""The id that stands for an image in ``input_ids``: outside the vocabulary, as in LLaVA's and MobileVLM's training code."""

IGNORE = -100
IMAGE_TAG = "<image>"

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_ROLES = {"human": "USER", "gpt": "ASSISTANT"}
_END = "</s>"
_ANSWER_MARK = " ASSISTANT: "


class PromptError(SampleError):
    """A conversation that its template cannot express."""


def check_template(template: str, known: Sequence[str]) -> None:
    """Refuse a template that a model does not know.

    Raises:
        ConfigError: names those it knows.
    """
    if template not in known:
        raise ConfigError(f"--template {template!r}: known are {', '.join(known)}")


@dataclass(frozen=True)
class Encoded:
    """Token ids (one placeholder an image) and labels (-100 = not supervised), both int64 ``[length]``."""

    input_ids: np.ndarray
    labels: np.ndarray
    truncated: bool

    @property
    def supervised(self) -> int:
        """Answer tokens that can be predicted: supervised positions after the first."""
        return int((self.labels[1:] != IGNORE).sum())

    @property
    def images(self) -> int:
        """Image placeholders left after truncation."""
        return int((self.input_ids == IMAGE_TOKEN_ID).sum())


Turns = Sequence[tuple[str, str]]
"""``(speaker, text)`` pairs, speaker ``human``, ``gpt`` or ``system``. A system turn without words is as if it were absent."""

Part = tuple[str, bool]
"""Text of a prompt, and whether it is the conversation's own; the template's otherwise."""


def split_system(turns: Turns) -> tuple[str, list[tuple[str, str]]]:
    """The text of a system turn at the beginning, "" for none, and the other turns.

    Raises:
        PromptError: a system turn stands elsewhere.
    """
    worded = [(number, turn) for number, turn in enumerate(turns) if turn[0] != "system" or turn[1].strip()]
    system = worded.pop(0)[1][1] if worded and worded[0][1][0] == "system" else ""
    for number, (speaker, _) in worded:
        if speaker == "system":
            raise PromptError(f"turn {number} is a system turn: expected one at most, before turns that alternate human, gpt")
    return system, [turn for _, turn in worded]


def refuse_system(turns: Turns, template: str) -> list[tuple[str, str]]:
    """The turns without system turns that say nothing.

    Raises:
        PromptError: a system turn has words.
    """
    if any(speaker == "system" and text.strip() for speaker, text in turns):
        raise PromptError(
            f"the template {template} has no place for a system turn: use a template that has one, or take the turn out of the"
            " data"
        )
    return [turn for turn in turns if turn[0] != "system"]


def encode_conversation(turns: Turns, *, template: str, tokenizer: Any, has_image: bool, max_length: int) -> Encoded:
    """Token ids and labels of a whole conversation, cut at ``max_length`` ids (an image counts as one).

    Raises:
        PromptError: the turns do not alternate, or the template cannot express them.
        ConfigError: an unknown template.
    """
    turns = _image_first(turns) if has_image else list(turns)
    if template == "plain":
        ids, labels = _encode_plain(turns, tokenizer, has_image)
        length = len(ids)
    elif template == "v1":
        ids, labels, length = _encode_v1(turns, tokenizer, has_image, max_length)
    else:
        raise ConfigError(f"template is {template!r}; known are {', '.join(TEMPLATES)}")
    return Encoded(
        np.asarray(ids[:max_length], dtype=np.int64),
        np.asarray(labels[:max_length], dtype=np.int64),
        truncated=length > max_length,
    )


def encode_question(turns: Turns, *, template: str, tokenizer: Any, has_image: bool) -> np.ndarray:
    """Token ids of a conversation up to where its last answer begins, for generation; int64 ``[length]``.

    Raises:
        PromptError: the last turn is not an answer.
    """
    turns = _image_first(turns) if has_image else list(turns)
    if not turns or turns[-1][0] != "gpt":
        raise PromptError("the last turn must be the answer ('gpt') to compare with")
    if template == "plain":
        turns = refuse_system(turns, template)
        text = IMAGE_TAG * sum(t.count(IMAGE_TAG) for _, t in turns) if has_image else ""
    else:
        text = _v1_text([*turns[:-1], ("gpt", "")])
    return np.asarray(tokenize_with_images(text, tokenizer) if has_image else _ids(text, tokenizer), dtype=np.int64)


def parts_of(turns: Turns, *, template: str, has_image: bool) -> tuple[list[Part], int]:
    """What :func:`encode_conversation` tokenises, part by part, and how many turns before it are not used.

    Raises:
        PromptError: the turns do not alternate, or the template cannot express them.
    """
    turns = _image_first(turns) if has_image else list(turns)
    if template == "plain":
        return list(_plain_parts(refuse_system(turns, template), has_image)), len(turns) - 1
    asked = next((number for number, (speaker, _) in enumerate(turns) if speaker == "human"), len(turns))
    return list(_v1_parts(turns)), 0 if split_system(turns)[0] else asked


def tokenize_with_images(text: str, tokenizer: Any) -> list[int]:
    """Tokenise the text around each ``<image>``, which becomes the placeholder id; one start token in all."""
    chunks = [_ids(chunk, tokenizer) for chunk in text.split(IMAGE_TAG)]
    has_start = bool(chunks[0]) and chunks[0][0] == tokenizer.bos_token_id
    ids = list(chunks[0])
    for chunk in chunks[1:]:
        ids.append(IMAGE_TOKEN_ID)
        ids.extend(chunk[1:] if has_start else chunk)
    return ids


def _ids(text: str, tokenizer: Any) -> Sequence[int]:
    encode = getattr(tokenizer, "encode_chunk", None)
    ids: Sequence[int] = encode(text) if encode is not None else tokenizer(text).input_ids
    return ids


def _image_first(turns: Turns) -> list[tuple[str, str]]:
    reordered = []
    for speaker, text in turns:
        count = text.count(IMAGE_TAG)
        if count:
            if speaker == "system":
                raise PromptError("its system turn holds an image: images belong to questions")
            text = (f"{IMAGE_TAG}\n" * count + text.replace(IMAGE_TAG, "").strip()).strip()
        reordered.append((speaker, text))
    return reordered


def _encode_plain(turns: Turns, tokenizer: Any, has_image: bool) -> tuple[list[int], list[int]]:
    turns = refuse_system(turns, "plain")
    if len(turns) != 2:
        raise PromptError(f"the plain template takes one question and one answer, found {len(turns)} turns")
    images, *answer = (text for text, _ in _plain_parts(turns, has_image))
    ids = tokenize_with_images(images + "".join(answer), tokenizer)
    masked = len(tokenize_with_images(images, tokenizer))
    return ids, [IGNORE] * masked + ids[masked:]


def _plain_parts(turns: Turns, has_image: bool) -> Iterator[Part]:
    yield IMAGE_TAG * sum(text.count(IMAGE_TAG) for _, text in turns) if has_image else "", False
    yield turns[1][1].replace(IMAGE_TAG, ""), True
    yield "\n", False


def _v1_text(turns: Turns) -> str:
    return "".join(text for text, _ in _v1_parts(turns))


def _v1_parts(turns: Turns) -> Iterator[Part]:
    system, turns = split_system(turns)
    if system:
        _check_v1_system(system)
    elif turns and turns[0][0] != "human":
        turns = turns[1:]
    yield system or SYSTEM, bool(system)
    yield " ", False
    for index, (speaker, message) in enumerate(turns):
        if speaker != ("human", "gpt")[index % 2]:
            raise PromptError(f"turn {index} is from {speaker!r}; turns must alternate human, gpt")
        yield _ROLES[speaker] + (": " if message else ":"), False
        yield message, True
        yield (" ", _END)[index % 2] if message else "", False


def _check_v1_system(text: str) -> None:
    """Refuse what the count of supervised ids would take for the end or the beginning of an answer."""
    if mark := next((mark for mark in (_END, _ANSWER_MARK) if mark in text + " "), None):
        raise PromptError(f"its system turn holds {mark.strip()!r}, which in the template v1 marks an answer")


def _encode_v1(turns: Turns, tokenizer: Any, has_image: bool, max_length: int) -> tuple[list[int], list[int], int]:
    """Ids, labels, and the length before anything was cut."""

    def tokenize(text: str) -> Sequence[int]:
        return tokenize_with_images(text, tokenizer) if has_image else _ids(text, tokenizer)

    text = _v1_text(turns)
    # Without an image the reference lets the tokenizer cut the whole text, but not the rounds it counts with.
    whole = tokenize(text)
    ids = list(whole if has_image else whole[:max_length])
    labels = list(ids)
    position = 1
    labels[:position] = [IGNORE] * min(position, len(labels))
    for round_text in text.split(_END):
        parts = round_text.split(_ANSWER_MARK)
        if not round_text or len(parts) != 2:
            break
        # "- 2": the round's own start token, and the word-start piece that the mark's last space becomes
        instruction = len(tokenize(parts[0] + _ANSWER_MARK)) - 2
        labels[position : position + instruction] = [IGNORE] * len(labels[position : position + instruction])
        position += len(tokenize(round_text))
    labels[position:] = [IGNORE] * len(labels[position:])
    # The reference masks the whole sample when its own count disagrees; that sample is rejected later, with its id.
    if position < max_length and position != len(ids) - ids.count(tokenizer.pad_token_id):
        labels = [IGNORE] * len(labels)
    return ids, labels, len(whole)
