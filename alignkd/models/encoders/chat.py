"""Prompts through a model's own processor and chat template, with exact labels.

1. The template renders the conversation (:mod:`alignkd.models.encoders.templates`): which characters are an answer's is found
   by rendering it with other texts, whatever the template adds, moves or strips.
2. The processor prepares images and tokenises the text (:mod:`alignkd.models.encoders.chat_processing`).
3. A token is supervised where it covers characters of an answer, or ends its turn.

``v1``, LLaVA's own prompt, is for checkpoints without a chat template, and to match a model of another family that uses it.

Shapes: L ids.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from alignkd.errors import CheckpointError
from alignkd.inputs.batch import ModelInput
from alignkd.inputs.encoder import Planned
from alignkd.inputs.prompts import IGNORE, IMAGE_TAG, PromptError, Turns
from alignkd.inputs.regions import stack
from alignkd.models.encoders.chat_processing import Processed, process
from alignkd.models.encoders.processors import load_processor
from alignkd.models.encoders.rendered import Rendered, contents, render_v1
from alignkd.models.encoders.rgb import check_prepared, rgb_by_processor
from alignkd.models.encoders.templates.chat_template import ChatTemplate
from alignkd.models.encoders.templates.prompts import TemplatePrompts
from alignkd.models.encoders.templates.special_tokens import special_tokens, structure_tokens

_TOKEN_INPUTS = ("token_type_ids", "mm_token_type_ids")
_TEXT = ("input_ids", "attention_mask", "offset_mapping", "text_replacement_offsets", *_TOKEN_INPUTS)


class RegionsOf(Protocol):
    """Where the vision tokens of an image lie: see :mod:`alignkd.inputs.regions`."""

    def __call__(
        self, processor: Any, outputs: Mapping[str, Any], index: int, size: tuple[int, int], tokens: int
    ) -> list[np.ndarray]:
        """Regions of the ``index``-th image of a sample, of ``size`` (width, height) and with ``tokens`` vision tokens.

        ``outputs``: the processor's, for all images.
        """


@dataclass
class ChatEncoder:
    """An :class:`alignkd.inputs.encoder.Encoder` of Pillow images. ``date``: what its template's clock shows; now if empty."""

    folder: Path
    model_type: str
    image_token_id: int
    image_inputs: frozenset[str]
    regions: RegionsOf
    max_length: int
    template: str = "chat"
    needs_sizes = True
    with_spans = True
    processor: Any = field(default=None, repr=False)
    date: str = ""

    def __post_init__(self) -> None:
        self.processor = self.processor or load_processor(self.folder, self.model_type)
        self.tokenizer = self.processor.tokenizer
        self._written = lru_cache(4096)(self._write_image)
        self._image_token = str(self.tokenizer.convert_ids_to_tokens(self.image_token_id))
        self._prompts = self._make_prompts() if self.template == "chat" else None
        self._refused = self._structure()

    def __getstate__(self) -> dict[str, Any]:
        """Without the processor: its class is made when it is loaded, and no other process knows it."""
        kept = ("folder", "model_type", "image_token_id", "image_inputs", "regions", "max_length", "template", "with_spans")
        return {name: getattr(self, name) for name in kept} | {"date": self.prompt_date}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, processor=None)
        self.__post_init__()

    def decode(self, image: Image.Image) -> Image.Image:
        """See :class:`alignkd.inputs.encoder.Encoder`."""
        check_prepared(image.size, self.processor.image_processor)
        return rgb_by_processor(image, self.processor.image_processor)

    @property
    def prompt_date(self) -> str:
        """See :class:`alignkd.inputs.encoder.Encoder`."""
        return self._prompts.template.date if self._prompts and self._prompts.template.uses_date else ""

    @prompt_date.setter
    def prompt_date(self, date: str) -> None:
        if self._prompts is not None:
            self._prompts.template.date = date

    def load(self, image: Image.Image) -> Image.Image:
        """The image in RGB and otherwise unchanged: the processor prepares it."""
        return self.decode(image)

    def plan(self, turns: Turns, images: int, sizes: Sequence[tuple[int, int]] = ()) -> Planned:
        """The length alone: the ids depend on the images."""
        rendered = self.render_text(turns, images)
        written = [self._written(size, len(sizes) > 1) for size in sizes]
        first, *rest = rendered.split(self.processor.image_token) if sizes else [rendered]
        text = first + "".join(image + after for (image, _), after in zip(written, rest, strict=True))
        ids = self.tokenizer(text, **self._text_settings(rendered)).input_ids
        return Planned(len(ids) + sum(omitted for _, omitted in written))

    def finish(self, turns: Turns, planned: Planned, images: Sequence[Image.Image]) -> tuple[ModelInput, bool]:
        """As :meth:`encode`: nothing of the plan is used again."""
        del planned
        return self.encode(turns, images)

    def encode(self, turns: Turns, images: Sequence[Image.Image]) -> tuple[ModelInput, bool]:
        """Ids, labels, pixel values and everything else that the model takes."""
        rendered = self.render(turns, len(images))
        processed = self.process(rendered, images)
        labels = np.where(processed.covers(rendered.supervised), processed.ids, IGNORE)
        return self._cut(processed, labels, processed.spans(rendered), images)

    def question(self, turns: Turns, images: Sequence[Image.Image]) -> ModelInput:
        """The prompt up to the last answer, with the template's own beginning of an answer."""
        if not turns or turns[-1][0] != "gpt":
            raise PromptError("the last turn must be the answer ('gpt') to compare with")
        text = self.render_text(turns[:-1], len(images), opened=True)
        processed = self.process(Rendered(text, [], np.zeros((len(text) + 1, 2), np.int64)), images)
        return self._input(processed, np.full_like(processed.ids, IGNORE), np.zeros((len(processed.ids), 2), np.int32), images)

    def render_text(self, turns: Turns, images: int, *, opened: bool = False) -> str:
        """The conversation as text; ``opened``: followed by the beginning of an answer."""
        if self._prompts is None:
            return self.render_v1(turns, images, opened=opened).text
        return self._prompts.render(contents(turns, images, self.check_part), opened=opened)

    def render(self, turns: Turns, images: int) -> Rendered:
        """The conversation as text, with what is supervised of it."""
        if self._prompts is None:
            return self.render_v1(turns, images)
        return self._prompts.render_answers(contents(turns, images, self.check_part))

    def render_v1(self, turns: Turns, images: int, *, opened: bool = False) -> Rendered:
        """In the form of LLaVA 1.5."""
        end = str(self.tokenizer.eos_token)
        return render_v1(turns, images, self.processor.image_token, end, self.check_part, opened=opened)

    def check_part(self, part: str) -> None:
        """Refuse a text with a token of the prompt's structure.

        Raises:
            PromptError: names it.
        """
        if "\ufdd0" in part or "\ufdd1" in part:
            raise PromptError("its text holds U+FDD0 or U+FDD1, which are not Unicode characters")
        found = next((token for token in self._refused if token in part), None)
        if found is not None:
            raise PromptError(f"its text holds the special token {found!r}, which the model would not read as text")

    def _make_prompts(self) -> TemplatePrompts:
        source = self.processor.chat_template
        source = source.get("default") if isinstance(source, dict) else source
        if source is None:
            raise CheckpointError(
                f"{self.folder} has no chat template, so the form of its prompts is not known: expected chat_template.jinja;"
                " copy that of the model's instruction-tuned release there, or use LLaVA's prompts with --template v1"
            )
        template = ChatTemplate(source, self.tokenizer.special_tokens_map, self.date)
        return TemplatePrompts(template, special_tokens(self.tokenizer), str(self.tokenizer.eos_token))

    def _structure(self) -> list[str]:
        """What texts may not hold."""
        images = (self._image_token, str(self.processor.image_token))
        if self._prompts is None:
            return structure_tokens(self.tokenizer, image_texts=images)
        template = self._prompts.template
        text = self._prompts.own_text() + "".join(ending.written for ending in self._prompts.endings)
        return structure_tokens(self.tokenizer, image_texts=images, template_text=text, read=template.read)

    def _text_settings(self, text: str) -> dict[str, bool]:
        """As transformers' ``apply_chat_template``: no start token is added where the template wrote one."""
        start = self.tokenizer.bos_token
        return {"add_special_tokens": False} if start is not None and text.startswith(start) else {}

    def process(self, rendered: Rendered, images: Sequence[Image.Image]) -> Processed:
        """Run the processor over one conversation."""
        return process(self.processor, self._image_token, rendered.text, images, **self._text_settings(rendered.text))

    def _cut(
        self, processed: Processed, labels: np.ndarray, spans: np.ndarray, images: Sequence[Image.Image]
    ) -> tuple[ModelInput, bool]:
        """Cut off text beyond the maximum length; vision tokens do not count."""
        vision = processed.ids == self.image_token_id
        length = int(np.searchsorted((~vision).cumsum(), self.max_length, side="right"))
        truncated = length < len(processed.ids)
        if vision[length:].any():
            raise PromptError(f"an image lies beyond the maximum length of {self.max_length} ids")
        if not (labels[1:length] != IGNORE).any():
            where = f" within {self.max_length} ids" if truncated else ""
            raise PromptError(f"no supervised token{where}: the answer is empty or cut off")
        return self._input(processed, labels, spans, images, length), truncated

    def _input(
        self,
        processed: Processed,
        labels: np.ndarray,
        spans: np.ndarray,
        images: Sequence[Image.Image],
        length: int | None = None,
    ) -> ModelInput:
        outputs = processed.outputs
        given = {name: _tensor(value) for name, value in outputs.items() if name in self.image_inputs and name not in _TEXT}
        regions = [
            region
            for index, (image, moved) in enumerate(zip(images, processed.moved, strict=True))
            for region in self.regions(self.processor, outputs, index, image.size, moved.tokens)
        ]
        return ModelInput(
            processed.ids[:length],
            labels[:length],
            given.pop("pixel_values", torch.zeros(0)),
            {name: np.asarray(outputs[name][0])[:length] for name in _TOKEN_INPUTS if name in outputs},
            given,
            stack(regions),
            spans[:length],
        )

    def _write_image(self, size: tuple[int, int], several: bool) -> tuple[str, int]:
        """What the processor writes for an image of this size, one vision token for each run of them; and how many are omitted.

        ``several``: for one of several images, for which some models use fewer tokens.
        """
        images = 2 if several else 1
        check_prepared(size, self.processor.image_processor, several=several)
        rendered = self.render([("human", f"{IMAGE_TAG * images}\na"), ("gpt", "b")], images)
        processed = self.process(rendered, [Image.new("RGB", size)] * images)
        written: str = processed.outputs["text_replacement_offsets"][0][0]["replacement"]
        token = self._image_token
        short = re.sub(f"({re.escape(token)})+", lambda run: run[1], written)
        return short, written.count(token) - short.count(token)


def _tensor(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.from_numpy(np.asarray(value))
