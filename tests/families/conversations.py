"""Conversations that every family is asked to take, and images of several shapes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from checkpoints import TinyFamily
from PIL import Image


@dataclass(frozen=True)
class Conversation:
    """Turns, and the (width, height) of each of its images."""

    name: str
    turns: tuple[tuple[str, str], ...]
    sizes: tuple[tuple[int, int], ...] = ()
    image_after_text: bool = False

    @property
    def images(self) -> list[Image.Image]:
        rng = np.random.default_rng(len(self.name))
        return [Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)) for width, height in self.sizes]

    @property
    def answers(self) -> list[str]:
        return [text for speaker, text in self.turns if speaker == "gpt"]

    def suits(self, family: TinyFamily) -> bool:
        return (
            (family.several_turns or len(self.turns) == 2)
            and (family.several_images or len(self.sizes) < 2)
            and (family.without_image or bool(self.sizes))
            and (family.image_after_text or not self.image_after_text)
        )


ONE = Conversation("one", (("human", "<image>\nWhat colour is the cat?"), ("gpt", "It is blue.")), ((48, 40),))
BYTES = Conversation(
    "bytes", (("human", "<image>\nWhich? \u65e5\u672c"), ("gpt", "a dog \u00e9\u00e8 \U0001f600 caf\u00e9")), ((30, 70),)
)
SYSTEM_TURN = Conversation(
    "system",
    (("system", "Answer in two words,\nna\u00efve ones."), ("human", "<image>\nWhat is it?"), ("gpt", "a dog")),
    ((48, 40),),
)
CONVERSATIONS = [
    ONE,
    BYTES,
    Conversation("last", (("human", "What is it?\n<image>"), ("gpt", "a dog")), ((64, 64),), image_after_text=True),
    Conversation(
        "turns",
        (("human", "<image>\nWhat is it?"), ("gpt", "a dog"), ("human", "And the mat?"), ("gpt", "red  or\ngreen")),
        ((90, 30),),
    ),
    Conversation("text", (("human", "what is it?"), ("gpt", "a dog \u00e9\u00e8 \U0001f600"))),
    Conversation(
        "two",
        (("human", "<image>\nand <image> which is red?"), ("gpt", "the cat")),
        ((40, 40), (80, 50)),
        image_after_text=True,
    ),
]


def suiting(family: TinyFamily) -> list[Conversation]:
    """Those that a family can take."""
    return [conversation for conversation in CONVERSATIONS if conversation.suits(family)]
