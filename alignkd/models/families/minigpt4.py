"""MiniGPT-4 behind the contract: frozen tower and Q-Former, a linear layer into Vicuna, the prompt it was tuned with.

Shapes: N images, M vision tokens of a batch, D language-model width, B samples, S positions.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from alignkd.inputs.batch import Batch
from alignkd.inputs.prompts import IMAGE_TAG, IMAGE_TOKEN_ID, Part, Turns, check_template
from alignkd.models.checkpoints.mobilevlm_layout import copy_tokenizer
from alignkd.models.encoders.images import ImagePreprocessor
from alignkd.models.encoders.segments import Segment, SegmentEncoder, own_text
from alignkd.models.modules.embedding import run_decoder
from alignkd.models.modules.minigpt4 import FrozenVision, MiniGpt4
from alignkd.models.vlm import Vision, Vlm

_END = "###"
_TEMPLATES = ("vicuna0",)


def image_settings(side: int) -> dict[str, Any]:
    """Of the released preprocessing: stretched to a square, CLIP's mean and deviation."""
    return {
        "size": {"height": side, "width": side},
        "do_center_crop": False,
        "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }


class MiniGpt4Encoder(SegmentEncoder):
    """``###Human: <Img>(image)</Img> question ###Assistant: answer###``, split at the image and where the answer begins.

    So it was tuned, on one question and one answer; further turns go on after the answer's ``###``. Images come first in their
    turn, as in the training prompts. Source: ``prompt_template``, ``prompts/alignment.txt`` and ``end_sym`` of its stage two.
    """

    marks: ClassVar[tuple[str, ...]] = (_END,)

    @property
    def image(self) -> Segment:
        """One placeholder."""
        return Segment(ids=(IMAGE_TOKEN_ID,))

    def pieces(self, turns: Turns, images: int) -> list[Segment]:
        """See :class:`SegmentEncoder`."""
        made = [Segment(ids=(int(self.tokenizer.bos_token_id),))]
        for number, (speaker, text) in enumerate(turns):
            if speaker == "gpt":
                made.append(Segment(((own_text(text), True), (_END, False)), learned=True))
                continue
            before: list[Part] = [(f"{_END if number == 0 else ''}Human: ", False)]
            for _ in range(text.count(IMAGE_TAG)):
                made += [Segment((*before, ("<Img>", False))), self.image]
                before = [("</Img> ", False)]
            made.append(Segment((*before, (own_text(text), True), (f" {_END}Assistant: ", False))))
        return made


@dataclass
class MiniGpt4Family(Vlm):
    """A loaded MiniGPT-4; ``tokenizer_folder`` is where its language model's tokenizer was read."""

    family: ClassVar[str] = "minigpt4"
    without_coordinates: ClassVar[str] = "each vision token is what a query of its Q-Former read all over the image"

    model: MiniGpt4
    images: ImagePreprocessor
    tokenizer_folder: Path

    @property
    def templates(self) -> tuple[str, ...]:
        """That of the release over Vicuna v0."""
        return _TEMPLATES

    @property
    def image_token_id(self) -> int:
        """LLaVA's placeholder, outside the vocabulary."""
        return IMAGE_TOKEN_ID

    @property
    def tokens_per_placeholder(self) -> int:
        """One placeholder an image."""
        return self.vision_tokens_per_image

    @property
    def vision_tokens_per_image(self) -> int:
        """The Q-Former's queries."""
        return int(self.model.config.num_query_tokens)

    @property
    def tower(self) -> nn.Module:
        """Tower, queries and Q-Former: frozen in every stage of MiniGPT-4's training, and here."""
        return FrozenVision(self.model)

    @property
    def projector(self) -> nn.Module:
        """The linear layer into the language model: all that MiniGPT-4 trains."""
        projector: nn.Module = self.model.language_projection
        return projector

    @property
    def decoder(self) -> Any:
        """Llama."""
        return self.model.language_model.get_decoder()

    def encoder(self, template: str, max_length: int) -> MiniGpt4Encoder:
        """See :class:`alignkd.models.vlm.Vlm`."""
        check_template(template, self.templates)
        vision = self.vision_tokens_per_image
        return MiniGpt4Encoder(self.tokenizer, self.images, template, max_length, self.image_token_id, vision)

    def encode_images(self, batch: Batch) -> Vision | None:
        """See :class:`alignkd.models.vlm.Vlm`."""
        return Vision(self.model.encode_images(batch.images).flatten(0, 1)) if batch.images.numel() else None

    def decode(self, batch: Batch, vision: Vision | None, **kwargs: Any) -> torch.Tensor:
        """See :class:`alignkd.models.vlm.Vlm`."""
        return run_decoder(self.model.get_input_embeddings(), self.decoder, batch, vision, **kwargs)

    def zero_projector_loss(self) -> torch.Tensor:
        """Of a black image."""
        return self.model.encode_images(self._black).float().sum() * 0.0

    @property
    def _black(self) -> torch.Tensor:
        side = int(self.model.config.vision_config.image_size)
        return torch.zeros(1, 3, side, side, device=self.device)

    def generation_inputs(self, batch: Batch) -> Mapping[str, Any]:
        """Pixel values, and what ends an answer: the tokenizer spells ``###`` in several ways.

        BLIP-2's generation wants an image even where no sample has one: nothing then reads what it sees.
        """
        pixels = batch.images if batch.images.numel() else self._black
        return {"pixel_values": pixels.to(self.dtype), "stop_strings": [_END], "tokenizer": self.tokenizer}

    def answer_text(self, ids: list[int]) -> str:
        """An answer without its end mark."""
        return super().answer_text(ids).split(_END)[0].strip()

    def image_fingerprint(self) -> str:
        """Of the preprocessing's settings."""
        return self.images.fingerprint()

    def save(self, folder: Path) -> None:
        """In Hugging Face form, all in one folder."""
        self.model.save_pretrained(folder)
        settings = {"image_processor_type": "CLIPImageProcessor", **self.images.settings}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2))
        copy_tokenizer(self.tokenizer_folder, folder)
