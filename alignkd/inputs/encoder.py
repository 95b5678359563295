"""How a conversation with images becomes a model's input: the part of the contract that loader processes need.

In two steps, because batches are laid out before any image is decoded: :meth:`Encoder.plan` knows the length, and
:meth:`Encoder.finish` has the images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from alignkd.inputs.batch import ModelInput
from alignkd.inputs.prompts import Encoded, Turns


@dataclass(frozen=True)
class Planned:
    """A conversation before its images are loaded: ``length`` in positions, vision tokens among them.

    ``encoded``: its ids and labels, where these do not depend on the images.
    """

    length: int
    encoded: Encoded | None = None


class Encoder(Protocol):
    """Turns samples into inputs of one model under one template; can be sent to worker processes."""

    template: str
    max_length: int
    needs_sizes: bool
    """Whether the length of a sample depends on the sizes of its images."""
    with_spans: bool
    """Whether inputs need to say which characters each id stands for; False lets an encoder save the time."""

    def plan(self, turns: Turns, images: int, sizes: Sequence[tuple[int, int]] = ()) -> Planned:
        """The first step, for a number of images or, where that matters, of (width, height) each.

        Raises:
            PromptError: the conversation cannot be used, and why.
        """

    def load(self, image: Image.Image) -> Any:
        """What :meth:`finish` takes for one image."""

    def finish(self, turns: Turns, planned: Planned, images: Sequence[Any]) -> tuple[ModelInput, bool]:
        """The second step: the input, and whether text was cut off.

        Raises:
            PromptError: the conversation cannot be used, and why.
        """

    def question(self, turns: Turns, images: Sequence[Any]) -> ModelInput:
        """The input up to where the last answer begins, for generation.

        Raises:
            PromptError: the last turn is no answer, or the conversation cannot be used.
        """
