"""Prompts through a model's own processor and chat template, with exact labels.

1. The template renders the conversation, each turn's text between two marks, which are removed again. So the characters of
   every turn are known, whatever the template adds, moves or strips.
2. The processor prepares images, writes as many placeholders as each image has vision tokens, and tokenises the text. It gives
   the characters that each token covers, and how far the placeholders moved them.
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
from alignkd.inputs.prompts import IGNORE, IMAGE_TAG, SYSTEM, PromptError, Turns
from alignkd.inputs.regions import stack
from alignkd.inputs.spans import counted as counted_characters
from alignkd.models.encoders.processors import load_processor
from alignkd.models.encoders.rgb import check_prepared, rgb_by_processor

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
"""Unicode non-characters: no text may hold them, so nothing else can be taken for a mark."""
_ROLES = {"human": "user", "gpt": "assistant"}
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


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and the characters of each turn's parts: ``(turn, start, end)`` in order."""

    text: str
    parts: list[tuple[int, int, int]]


@dataclass(frozen=True)
class Processed:
    """The processor's ids, the characters ``[L, 2]`` of each, and where placeholders moved the rendered text."""

    ids: np.ndarray
    offsets: np.ndarray
    moved: list["Moved"]
    outputs: Mapping[str, Any]


@dataclass(frozen=True)
class Moved:
    """An image's placeholder: ``(start, end)`` in the rendered text and in the processor's, and its vision tokens."""

    span: tuple[int, int]
    new_span: tuple[int, int]
    tokens: int


@dataclass
class ChatEncoder:
    """An :class:`alignkd.inputs.encoder.Encoder` of Pillow images."""

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

    def __post_init__(self) -> None:
        self.processor = self.processor or load_processor(self.folder, self.model_type)
        self.tokenizer = self.processor.tokenizer
        self._specials = _special_tokens(self.tokenizer)
        self._closing = ""
        self._written = lru_cache(4096)(self._write_image)
        self._closing = self._find_closing()

    def __getstate__(self) -> dict[str, Any]:
        """Without the processor: its class is made when it is loaded, and no other process knows it."""
        kept = ("folder", "model_type", "image_token_id", "image_inputs", "regions", "max_length", "template")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, processor=None)
        self.__post_init__()

    def decode(self, image: Image.Image) -> Image.Image:
        """See :class:`alignkd.inputs.encoder.Encoder`."""
        check_prepared(image.size, self.processor.image_processor)
        return rgb_by_processor(image, self.processor.image_processor)

    def load(self, image: Image.Image) -> Image.Image:
        """The image in RGB and otherwise unchanged: the processor prepares it."""
        return self.decode(image)

    def plan(self, turns: Turns, images: int, sizes: Sequence[tuple[int, int]] = ()) -> Planned:
        """The length alone: the ids depend on the images."""
        rendered = self.render(turns, images)
        written = [self._written(size, len(sizes) > 1) for size in sizes]
        first, *rest = rendered.text.split(self.processor.image_token) if sizes else [rendered.text]
        text = first + "".join(image + after for (image, _), after in zip(written, rest, strict=True))
        ids = self.tokenizer(text, add_special_tokens=self._adds_start(rendered.text)).input_ids
        return Planned(len(ids) + sum(omitted for _, omitted in written))

    def finish(self, turns: Turns, planned: Planned, images: Sequence[Image.Image]) -> tuple[ModelInput, bool]:
        """As :meth:`encode`: nothing of the plan is used again."""
        del planned
        return self.encode(turns, images)

    def encode(self, turns: Turns, images: Sequence[Image.Image]) -> tuple[ModelInput, bool]:
        """Ids, labels, pixel values and everything else that the model takes."""
        rendered = self.render(turns, len(images))
        processed = self.process(rendered, images)
        spans = self._spans(rendered, processed)
        answers = [(start, end) for turn, start, end in self._ends(rendered) if turns[turn][0] == "gpt"]
        labels = np.where(_covers(processed, answers), processed.ids, IGNORE)
        return self._cut(processed, labels, spans, images)

    def question(self, turns: Turns, images: Sequence[Image.Image]) -> ModelInput:
        """The prompt up to the last answer, with the template's own beginning of an answer."""
        if not turns or turns[-1][0] != "gpt":
            raise PromptError("the last turn must be the answer ('gpt') to compare with")
        processed = self.process(self.render(turns[:-1], len(images), opened=True), images)
        return self._input(processed, np.full_like(processed.ids, IGNORE), np.zeros((len(processed.ids), 2), np.int32), images)

    def render(self, turns: Turns, images: int, *, opened: bool = False) -> Rendered:
        """The conversation as text; ``opened``: followed by the beginning of an answer."""
        messages: list[dict[str, Any]] = []
        owners = []
        for number, (speaker, text) in enumerate(turns):
            if speaker != ("human", "gpt")[number % 2]:
                raise PromptError(f"turn {number} is from {speaker!r}; turns must alternate human, gpt")
            content: list[dict[str, str]] = []
            answer = speaker == "gpt"
            pieces = text.split(IMAGE_TAG) if images else [text]
            if answer and len(pieces) > 1:
                raise PromptError(f"turn {number} is an answer that holds an image, which no model here can generate")
            for position, part in enumerate(pieces):
                content += [{"type": "image"}] if position else []
                part = part.strip()
                self._check_part(part)
                if part or answer:
                    end = self._closing if answer else ""
                    content.append({"type": "text", "text": f"{_OPEN}{part}{end}{_CLOSE}"})
                    owners.append(number)
            messages.append({"role": _ROLES[speaker], "content": content})
        named = sum(part["type"] == "image" for message in messages for part in message["content"])
        if named != images:
            raise PromptError(f"its text names {named} images, the sample has {images}")
        return self._unmark(self.apply_template(messages, opened=opened), owners)

    def apply_template(self, messages: list[dict[str, Any]], *, opened: bool) -> str:
        """The text of the model's own template, or of LLaVA's ``v1``."""
        if self.template == "v1":
            return _as_v1(messages, self.processor.image_token, opened=opened)
        try:
            text: str = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
        except Exception as error:  # a template may raise any error
            raise PromptError(f"the chat template rejects it: {str(error)[:200]}") from error
        if not isinstance(text, str):
            raise PromptError(f"the chat template gives a {type(text).__name__}, expected text")
        return text

    def _check_part(self, part: str) -> None:
        if _OPEN in part or _CLOSE in part:
            raise PromptError("its text holds U+FDD0 or U+FDD1, which are not Unicode characters")
        found = next((token for token in self._specials if token in part), None)
        if found is not None:
            raise PromptError(f"its text holds the special token {found!r}, which the model would not read as text")

    def _unmark(self, marked: str, owners: list[int]) -> Rendered:
        text, parts, start = "", [], None
        for piece in re.split(f"([{_OPEN}{_CLOSE}])", marked):
            if piece == _OPEN:
                start = len(text)
            elif piece == _CLOSE:
                if start is None:
                    raise PromptError("the chat template tears its texts apart")
                parts.append((start, len(text)))
            else:
                text += piece
        if len(parts) != len(owners):
            raise PromptError(f"the chat template left out {len(owners) - len(parts)} of its {len(owners)} texts")
        return Rendered(text, [(owner, *part) for owner, part in zip(owners, parts, strict=True)])

    def _find_closing(self) -> str:
        """What ends an answer, where the template does not end it.

        Raises:
            CheckpointError: there is no chat template.
        """
        if self.template == "chat" and self.processor.chat_template is None:
            raise CheckpointError(
                f"{self.folder} has no chat template, so the form of its prompts is not known: expected chat_template.jinja;"
                " copy that of the model's instruction-tuned release there, or use LLaVA's prompts with --template v1"
            )
        return "" if self._closes(self.render([("human", "a"), ("gpt", "b")], 0)) else str(self.tokenizer.eos_token)

    def _closes(self, rendered: Rendered) -> bool:
        """Whether a special token follows the last answer."""
        return any(rendered.text[rendered.parts[-1][2] :].lstrip().startswith(token) for token in self._specials)

    def _ends(self, rendered: Rendered) -> list[tuple[int, int, int]]:
        """The parts, each with what directly follows it: for an answer, the end of its turn."""
        closed = bool(self._closing)
        return [
            (turn, start, end if closed and turn % 2 else end + self._end_of_turn(rendered.text[end:]))
            for turn, start, end in rendered.parts
        ]

    def _end_of_turn(self, rest: str) -> int:
        """How many characters end a turn: its end token and special tokens directly before it, or else one special token."""
        space = len(rest) - len(rest.lstrip())
        tokens: list[str] = []
        while found := next((t for t in self._specials if rest.startswith(t, space + sum(map(len, tokens)))), ""):
            tokens.append(found)
            if found == self.tokenizer.eos_token:
                return space + sum(map(len, tokens))
        return space + len(tokens[0]) if tokens else 0

    def _adds_start(self, text: str) -> bool:
        """Whether the tokenizer should add its start token: not where the template wrote one."""
        start = self.tokenizer.bos_token
        return start is None or not text.startswith(start)

    def process(self, rendered: Rendered, images: Sequence[Image.Image]) -> Processed:
        """Run the processor over one conversation."""
        return self._process(rendered.text, images, add_special_tokens=self._adds_start(rendered.text))

    def _process(self, text: str, images: Sequence[Image.Image], **settings: Any) -> Processed:
        for image in images if len(images) > 1 else ():
            check_prepared(image.size, self.processor.image_processor, several=True)
        try:
            outputs = self.processor(
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
        token = str(self.tokenizer.convert_ids_to_tokens(self.image_token_id))
        moved = [Moved(r["span"], r["new_span"], r["replacement"].count(token)) for r in replaced]
        if len(moved) != len(images):
            raise PromptError(f"the model's processor says where {len(moved)} images are, but it was given {len(images)}")
        ids, offsets = np.asarray(outputs["input_ids"][0]), np.asarray(outputs["offset_mapping"][0])
        return Processed(ids, offsets.reshape(-1, 2), moved, outputs)

    def _spans(self, rendered: Rendered, processed: Processed) -> np.ndarray:
        """Which of the conversation's characters each id stands for: see :mod:`alignkd.inputs.spans`."""
        counted = np.zeros(len(rendered.text) + 1, dtype=np.int64)
        for turn, start, end in rendered.parts:
            end -= len(self._closing) if turn % 2 else 0
            counted[start + 1 : end + 1] = counted_characters(rendered.text[start:end])
        counted = counted.cumsum()
        start, end = (counted[_before(edge, processed, len(rendered.text))] for edge in processed.offsets.T)
        return np.stack([start, end], axis=1).astype(np.int32)

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
        token = str(self.tokenizer.convert_ids_to_tokens(self.image_token_id))
        short = re.sub(f"({re.escape(token)})+", lambda run: run[1], written)
        return short, written.count(token) - short.count(token)


def _as_v1(messages: Sequence[Mapping[str, Any]], image_token: str, *, opened: bool) -> str:
    """Messages in the form that LLaVA 1.5 was trained with; the answer's text holds its end token already."""
    text = f"{SYSTEM} "
    for message in messages:
        parts = [f"{image_token}\n" if part["type"] == "image" else part["text"] for part in message["content"]]
        end = " " if message["role"] == "user" else ""
        text += f"{message['role'].upper()}: {''.join(parts)}{end}"
    return f"{text}ASSISTANT:" if opened else text


def _special_tokens(tokenizer: Any) -> list[str]:
    """All special tokens, the longest first: a tokenizer names only some of them (Gemma's end of a turn has no name)."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(added | set(map(str, tokenizer.all_special_tokens)), key=len, reverse=True)


def _tensor(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.from_numpy(np.asarray(value))


def _before(edge_L: np.ndarray, processed: Processed, longest: int) -> np.ndarray:
    """Characters of the processor's text, as characters of the rendered text.

    The text that replaced a placeholder lies where the placeholder was.
    """
    before_L = edge_L.copy()
    for moved in processed.moved:
        (_, end), (new_start, new_end) = moved.span, moved.new_span
        before_L = np.where(edge_L > new_start, end + np.maximum(edge_L - new_end, 0), before_L)
    return before_L.clip(0, longest)


def _covers(processed: Processed, ranges: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which ids cover a character of the ranges ``(start, end)`` of the rendered text, ``[L]`` of bool."""
    longest = int(max([end for _, end in ranges], default=0)) + int(processed.offsets.max(initial=0))
    start_L, end_L = (_before(edge, processed, longest) for edge in processed.offsets.T)
    found = np.zeros(len(processed.ids), dtype=bool)
    for start, end in ranges:
        found |= (start_L < end) & (end_L > start)
    return found
