"""How a conversation with images becomes a model's input: the part of the contract that loader processes need.

:meth:`Encoder.encode` does all at once. Stage one works in two steps, because it lays out its batches before it decodes any
image: :meth:`Encoder.plan` knows the length, and :meth:`Encoder.finish` has the images.

Shapes: L ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from PIL import Image

from alignkd.inputs.batch import ModelInput
from alignkd.inputs.prompts import Encoded, Turns
from alignkd.inputs.spans import NO_SPANS


@dataclass(frozen=True)
class Planned:
    """A conversation before its images are loaded: ``length`` in positions, vision tokens among them.

    ``encoded`` and ``spans`` (``[L, 2]``, see :mod:`alignkd.inputs.spans`): its ids, labels and characters, where these do not
    depend on the images, so that :meth:`Encoder.finish` need not tokenise again.
    """

    length: int
    encoded: Encoded | None = None
    spans: np.ndarray = field(default_factory=lambda: NO_SPANS)


class Encoder(Protocol):
    """Turns samples into inputs of one model under one template; can be sent to worker processes."""

    template: str
    max_length: int
    needs_sizes: bool
    """Whether the length of a sample depends on the sizes of its images."""
    with_spans: bool
    """Whether inputs must say which characters each id stands for; False lets an encoder save the time."""
    prompt_date: str
    """The moment (ISO 8601) that its prompts show where a chat template writes the date; empty where none does."""

    def encode(self, turns: Turns, images: Sequence[Any]) -> tuple[ModelInput, bool]:
        """The input, and whether text was cut off; ``images`` as :meth:`load` gives them. Renders and tokenises once.

        Raises:
            PromptError: the conversation cannot be used, and why.
        """

    def plan(self, turns: Turns, images: int, sizes: Sequence[tuple[int, int]] = ()) -> Planned:
        """The first step, for a number of images or, where ``needs_sizes``, of (width, height) each.

        Raises:
            PromptError: the conversation cannot be used, and why.
        """

    def decode(self, image: Image.Image) -> Image.Image:
        """The pixels of an opened file in RGB, as the model's own loader gives them; an RGB image is returned unchanged.

        Raises:
            SampleError: the file is damaged, or would be too large when it is padded or resized: that is checked first.
        """

    def load(self, image: Image.Image) -> Any:
        """What :meth:`encode` and :meth:`finish` take for one image, in any mode."""

    def finish(self, turns: Turns, planned: Planned, images: Sequence[Any]) -> tuple[ModelInput, bool]:
        """The second step, of what :meth:`plan` gave for these turns; as :meth:`encode`.

        Raises:
            PromptError: the conversation cannot be used, and why.
        """

    def question(self, turns: Turns, images: Sequence[Any]) -> ModelInput:
        """The input up to where the last answer begins, for generation.

        Raises:
            PromptError: the last turn is no answer, or the conversation cannot be used.
        """
