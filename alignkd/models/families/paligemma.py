"""PaliGemma: a fixed number of vision tokens an image, the question as a prefix with attention in both directions, then the
answer as its suffix.

It has no chat template. A prompt is one question and one answer, in the order of its training: images, start token, question,
newline, answer, end token.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from alignkd.inputs.encoder import Planned
from alignkd.inputs.prompts import IMAGE_TAG, PromptError, Turns
from alignkd.inputs.regions import region
from alignkd.models.encoders.chat import ChatEncoder, Processed, Rendered
from alignkd.models.transformers_vlm import TransformersVlm


class PrefixEncoder(ChatEncoder):
    """Questions as prefixes, answers as suffixes; its rendered text is ``images + question + newline + answer + end``."""

    def _find_closing(self) -> str:
        return str(self.tokenizer.eos_token)

    def render(self, turns: Turns, images: int, *, opened: bool = False) -> Rendered:
        """See :class:`ChatEncoder`. Images go to the front: the model was trained with none elsewhere."""
        speakers = [speaker for speaker, _ in turns]
        if speakers != ["human", "gpt"][: 1 if opened else 2]:
            raise PromptError(f"the prefix template takes one question and one answer, found turns from {speakers}")
        shown = sum(text.count(IMAGE_TAG) for _, text in turns)
        if shown != images:
            raise PromptError(f"its text names {shown} images, the sample has {images}")
        if not images:
            raise PromptError("it has no image, which PaliGemma's processor does not take")
        texts = [" ".join(part.strip() for part in text.split(IMAGE_TAG)).strip() for _, text in turns]
        for text in texts:
            self._check_part(text)
        text, parts = self.processor.image_token * images, []
        for turn, content in enumerate(texts):
            content += ("\n", self._closing)[turn]
            parts.append((turn, len(text), len(text) + len(content) - (turn == 0)))
            text += content
        return Rendered(text, parts)

    def plan(self, turns: Turns, images: int, sizes: Sequence[tuple[int, int]] = ()) -> Planned:
        """See :class:`ChatEncoder`."""
        del sizes
        rendered = self.render(turns, images)
        question, answer = (rendered.text[start:end] for _, start, end in rendered.parts)
        ids = self.tokenizer(f"{self.tokenizer.bos_token}{question}\n", answer, add_special_tokens=False).input_ids
        return Planned(len(ids) + images * int(self.processor.image_seq_length))

    def process(self, rendered: Rendered, images: Sequence[Image.Image]) -> Processed:
        """See :class:`ChatEncoder`; the processor itself adds start, newline and end."""
        (_, _, end), *answers = rendered.parts
        suffix = [rendered.text[first : last - len(self._closing)] for _, first, last in answers]
        processed = self._process(rendered.text[:end], images, **({"suffix": suffix} if suffix else {}))
        last, start = processed.moved[-1], len(self.tokenizer.bos_token)
        after_images = replace(last, new_span=(last.new_span[0], last.new_span[1] + start))
        moved = [*processed.moved[:-1], after_images]
        # The tokenizer counts the characters of the suffix from its own beginning.
        prefix = end + 1 + after_images.new_span[1] - last.span[1]
        in_suffix = np.asarray(processed.outputs["token_type_ids"][0])[:, None] == 1
        return replace(processed, moved=moved, offsets=processed.offsets + in_suffix * prefix)


@dataclass
class PaliGemma(TransformersVlm):
    """``PaliGemmaForConditionalGeneration``."""

    encoder_class: ClassVar[type[ChatEncoder]] = PrefixEncoder

    @property
    def templates(self) -> tuple[str, ...]:
        """Question as prefix, answer as suffix."""
        return ("prefix",)

    @staticmethod
    def regions(processor: Any, outputs: Mapping[str, Any], index: int, size: tuple[int, int], tokens: int) -> list[np.ndarray]:
        """The whole image, stretched to a square."""
        del processor, outputs, size
        side = math.isqrt(tokens)
        return [region(index, (side, side))]
