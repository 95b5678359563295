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
from alignkd.inputs.prompts import IMAGE_TAG, PromptError, Turns, refuse_system
from alignkd.inputs.regions import region
from alignkd.models.encoders.chat import ChatEncoder
from alignkd.models.encoders.chat_processing import Processed, process
from alignkd.models.encoders.rendered import Rendered
from alignkd.models.transformers_vlm import TransformersVlm


class PrefixEncoder(ChatEncoder):
    """Questions as prefixes, answers as suffixes; its rendered text is ``images + question + newline + answer + end``."""

    def render(self, turns: Turns, images: int) -> Rendered:
        """See :class:`ChatEncoder`. Images go to the front: the model was trained with none elsewhere.

        An image's line break goes with it, and a question is stripped; an answer is the processor's suffix as it stands.
        """
        question, answer = self._texts(turns, images, 2)
        text = f"{self.processor.image_token * images}{question}\n"
        start, end = len(text), len(text) + len(answer)
        text += f"{answer}{self.tokenizer.eos_token}"
        return Rendered.of_parts(text, [(start - 1 - len(question), start - 1), (start, end)], [(start, len(text))])

    def render_text(self, turns: Turns, images: int, *, opened: bool = False) -> str:
        """See :class:`ChatEncoder`; ``opened``: up to the newline after the question."""
        if not opened:
            return self.render(turns, images).text
        (question,) = self._texts(turns, images, 1)
        return f"{self.processor.image_token * images}{question}\n"

    def _texts(self, turns: Turns, images: int, count: int) -> list[str]:
        turns = refuse_system(turns, self.template)
        speakers = [speaker for speaker, _ in turns]
        if speakers != ["human", "gpt"][:count]:
            raise PromptError(f"the prefix template takes one question and one answer, found turns from {speakers}")
        shown = sum(text.count(IMAGE_TAG) for _, text in turns)
        if shown != images:
            raise PromptError(f"its text names {shown} images, the sample has {images}")
        if not images:
            raise PromptError("it has no image, which PaliGemma's processor does not take")
        texts = [" ".join(part.strip() for part in turns[0][1].split(IMAGE_TAG)).strip()]
        texts += [text.replace(IMAGE_TAG, "") for _, text in turns[1:]]
        for text in texts:
            self.check_part(text)
        return texts

    def plan(self, turns: Turns, images: int, sizes: Sequence[tuple[int, int]] = ()) -> Planned:
        """See :class:`ChatEncoder`."""
        del sizes
        question, answer = self._texts(turns, images, 2)
        start, end = self.tokenizer.bos_token, self.tokenizer.eos_token
        ids = self.tokenizer(f"{start}{question}\n", f"{answer}{end}", add_special_tokens=False).input_ids
        return Planned(len(ids) + images * int(self.processor.image_seq_length))

    def process(self, rendered: Rendered, images: Sequence[Image.Image]) -> Processed:
        """See :class:`ChatEncoder`; the processor itself adds start, newline and end."""
        text, start = rendered.text, len(self.tokenizer.bos_token)
        begin = rendered.supervised[0][0] if rendered.supervised else len(text)
        suffix = [text[begin:].removesuffix(self.tokenizer.eos_token)] if rendered.supervised else []
        processed = process(
            self.processor, self._image_token, text[: begin - 1], images, **({"suffix": suffix} if suffix else {})
        )
        last = processed.moved[-1]
        after_images = replace(last, new_span=(last.new_span[0], last.new_span[1] + start))
        moved = [*processed.moved[:-1], after_images]
        # The tokenizer counts the characters of the suffix from its own beginning.
        prefix = begin + after_images.new_span[1] - last.span[1]
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
