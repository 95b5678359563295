"""A rendered conversation through a model's own processor: ids, and which characters of the text each stands for.

The processor prepares images, writes as many placeholders as each image has vision tokens, and tokenises the text. It says
which characters each token covers, and how far the placeholders moved them.

Shapes: L ids.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from alignkd.inputs.prompts import PromptError
from alignkd.models.encoders.rendered import Range, Rendered
from alignkd.models.encoders.rgb import check_prepared


@dataclass(frozen=True)
class Moved:
    """An image's placeholder: ``(start, end)`` in the rendered text and in the processor's, and its vision tokens."""

    span: Range
    new_span: Range
    tokens: int


@dataclass(frozen=True)
class Processed:
    """The processor's ids, the characters ``[L, 2]`` of each, and where placeholders moved the rendered text."""

    ids: np.ndarray
    offsets: np.ndarray
    moved: list[Moved]
    outputs: Mapping[str, Any]

    def covers(self, ranges: Sequence[Range]) -> np.ndarray:
        """Which ids cover a character of the ranges ``(start, end)`` of the rendered text, ``[L]`` of bool."""
        longest = int(max([end for _, end in ranges], default=0)) + int(self.offsets.max(initial=0))
        start_L, end_L = (self._before(edge, longest) for edge in self.offsets.T)
        chosen = np.zeros(longest + 2, dtype=np.int64)
        for start, end in ranges:
            chosen[start + 1 : end + 1] = 1
        before = chosen.cumsum()
        found: np.ndarray = (before[end_L] > before[start_L]) & (end_L > start_L)
        return found

    def spans(self, rendered: Rendered) -> np.ndarray:
        """Which of the conversation's characters each id stands for, ``[L, 2]``: see :mod:`alignkd.inputs.spans`."""
        start_L, end_L = (self._before(edge, len(rendered.text)) for edge in self.offsets.T)
        start, end = rendered.counts_C2[start_L, 0], rendered.counts_C2[end_L, 1]
        return np.stack([np.minimum(start, end), end], axis=1).astype(np.int32)

    def _before(self, edge_L: np.ndarray, longest: int) -> np.ndarray:
        """Characters of the processor's text, as characters of the rendered text.

        The text that replaced a placeholder lies where the placeholder was.
        """
        before_L = edge_L.copy()
        for moved in self.moved:
            (_, end), (new_start, new_end) = moved.span, moved.new_span
            before_L = np.where(edge_L > new_start, end + np.maximum(edge_L - new_end, 0), before_L)
        return before_L.clip(0, longest)


def process(processor: Any, image_token: str, text: str, images: Sequence[Image.Image], **settings: Any) -> Processed:
    """Run a processor over one conversation's text and images.

    Raises:
        PromptError: it rejects them, or does not say where vision tokens are.
    """
    for image in images if len(images) > 1 else ():
        check_prepared(image.size, processor.image_processor, several=True)
    try:
        outputs = processor(
            text=[text],
            images=[list(images)] if images else None,
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
            **settings,
        )
    except MemoryError:
        raise
    except Exception as error:  # a processor may raise any error
        raise PromptError(f"the model's processor rejects it ({type(error).__name__}: {str(error)[:200]})") from error
    if images and "text_replacement_offsets" not in outputs:
        raise PromptError("the model's processor does not say where in the text it puts vision tokens")
    replaced = (outputs.get("text_replacement_offsets") or [[]])[0]
    moved = [Moved(r["span"], r["new_span"], r["replacement"].count(image_token)) for r in replaced]
    if len(moved) != len(images):
        raise PromptError(f"the model's processor says where {len(moved)} images are, but it was given {len(images)}")
    ids, offsets = np.asarray(outputs["input_ids"][0]), np.asarray(outputs["offset_mapping"][0])
    return Processed(ids, offsets.reshape(-1, 2), moved, outputs)
