"""A conversation as one text, with what is supervised of it and which characters of the conversation it shows.

Shapes: C characters of the rendered text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from alignkd.inputs.prompts import IMAGE_TAG, SYSTEM, PromptError, Turns, split_system
from alignkd.inputs.spans import counted

Range = tuple[int, int]
Content = list[str | None]
"""A turn's texts, and None for each image."""


class Turn(NamedTuple):
    """Who speaks (``human``, ``gpt`` or ``system``), and what."""

    speaker: str
    content: Content


_ROLES = {"human": "USER", "gpt": "ASSISTANT"}


@dataclass(frozen=True)
class Rendered:
    """``supervised``: ranges of characters (start, end).

    ``counts_C2``: how many characters of the conversation (as :mod:`alignkd.inputs.spans` counts them) come before each place
    of the text, ``[C + 1, 2]``: for a token that begins there, and for one that ends there. They differ where the text leaves
    out some of the conversation.
    """

    text: str
    supervised: list[Range]
    counts_C2: np.ndarray

    @classmethod
    def of_parts(cls, text: str, own: Sequence[Range], supervised: list[Range]) -> "Rendered":
        """A text of which the ranges ``own`` are the whole conversation, in its order."""
        flags = np.zeros(len(text) + 1, dtype=np.int64)
        for start, end in own:
            flags[start + 1 : end + 1] = counted(text[start:end])
        return cls(text, supervised, np.stack([flags.cumsum()] * 2, axis=1))


def contents(turns: Turns, images: int, check: Callable[[str], None]) -> list[Turn]:
    """Each turn split at its images, its texts as they stand; ``check`` is called with each text.

    Raises:
        PromptError: turns that do not alternate but for system turns, an image in an answer or a system turn, or as many images
            as the text does not name.
    """
    found, spoken = list[Turn](), 0
    for number, (speaker, text) in enumerate(turns):
        if speaker == "system" and not text.strip():
            continue
        if speaker not in ("system", ("human", "gpt")[spoken % 2]):
            raise PromptError(f"turn {number} is from {speaker!r}; turns must alternate human, gpt")
        spoken += speaker != "system"
        first, *rest = text.split(IMAGE_TAG) if images else [text]
        if rest and speaker == "gpt":
            raise PromptError(f"turn {number} is an answer that holds an image, which no model here can generate")
        if rest and speaker == "system":
            raise PromptError("its system turn holds an image: images belong to questions")
        content: Content = [first]
        for part in rest:
            content += [None, part]
        for shown in content:
            if shown:
                check(shown)
        found.append(Turn(speaker, content))
    named = sum(part is None for turn in found for part in turn.content)
    if named != images:
        raise PromptError(f"its text names {named} images, the sample has {images}")
    return found


def render_v1(turns: Turns, images: int, image_token: str, end: str, check: Callable[[str], None], *, opened: bool) -> Rendered:
    """The form that LLaVA 1.5 was trained with, for a model of another family; texts are stripped, as it strips them.

    The text of a system turn takes the place of its system text.

    Raises:
        PromptError: see :func:`contents` and :func:`split_system`.
    """
    system = split_system(turns)[0].strip()
    text, own, supervised = f"{system or SYSTEM} ", [(0, len(system))], list[Range]()
    for speaker, content in contents(turns, images, check)[bool(system) :]:
        text += f"{_ROLES[speaker]}: "
        for part in content:
            if part is None:
                text += f"{image_token}\n"
                continue
            own.append((len(text), len(text) + len(part.strip())))
            text += part.strip()
        if speaker == "gpt":
            text += end
            supervised.append((own[-1][0], len(text)))
        else:
            text += " "
    return Rendered.of_parts(f"{text}ASSISTANT:" if opened else text, own, supervised)
