"""MiniGPT-4: a frozen tower and Q-Former, a linear layer into Vicuna, the prompt it was tuned with.

Shapes: N images, M vision tokens of a batch, D language-model width, B samples, S positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from alignkd.inputs.batch import Batch
from alignkd.inputs.prompts import IMAGE_TAG, IMAGE_TOKEN_ID, Part, Turns, check_template
from alignkd.models.checkpoints.minigpt4_layout import is_official, read_own, read_released, vicuna_folder
from alignkd.models.checkpoints.preprocessor_files import clip_settings, read_settings, write_settings
from alignkd.models.checkpoints.tokenizer_files import check_tokenizer, copy_tokenizer, load_tokenizer
from alignkd.models.encoders.images import ImagePreprocessor
from alignkd.models.encoders.segments import Segment, SegmentEncoder, own_answer, own_text
from alignkd.models.modules.embedding import run_decoder
from alignkd.models.modules.minigpt4 import FrozenVision, MiniGpt4
from alignkd.models.vlm import Vision, Vlm

_END = "###"
_TEMPLATES = ("vicuna0",)


def image_settings(side: int) -> dict[str, Any]:
    """The released preprocessing: stretched to a square, with CLIP's mean and deviation."""
    clip = clip_settings(side)
    kept = {name: clip[name] for name in ("resample", "image_mean", "image_std")}
    return {"size": {"height": side, "width": side}, "do_center_crop": False, **kept}


class MiniGpt4Encoder(SegmentEncoder):
    """``###Human: <Img>(image)</Img> question ###Assistant: answer###``, split at the image and where the answer begins.

    The model was tuned with this prompt, on one question and one answer; further turns follow the answer's ``###``. Images come
    first in their turn, as in the training prompts. A system turn stands before the first ``###``, as in the release's demo.
    Source: ``prompt_template``, ``prompts/alignment.txt`` and ``end_sym`` of its stage two; ``CONV_VISION_Vicuna0`` of
    ``minigpt4/conversation/conversation.py``.
    """

    marks: ClassVar[tuple[str, ...]] = (_END,)
    takes_system: ClassVar[bool] = True

    @property
    def image(self) -> Segment:
        """One placeholder."""
        return Segment(ids=(IMAGE_TOKEN_ID,))

    def segments(self, turns: Turns, images: int) -> list[Segment]:
        """See :class:`SegmentEncoder`."""
        made = [Segment(ids=(int(self.tokenizer.bos_token_id),))]
        opening: list[Part] = [(_END, False)]
        for speaker, text in turns:
            if speaker == "system":
                opening = [(own_text(text), True), *opening]
                continue
            if speaker == "gpt":
                made.append(Segment(((own_answer(text), True), (_END, False)), supervised=True))
                continue
            before: list[Part] = [*opening, ("Human: ", False)]
            opening = []
            for _ in range(text.count(IMAGE_TAG)):
                made += [Segment((*before, ("<Img>", False))), self.image]
                before = [("</Img> ", False)]
            made.append(Segment((*before, (own_text(text), True), (f" {_END}Assistant: ", False))))
        return made


@dataclass
class MiniGpt4Family(Vlm):
    """A loaded MiniGPT-4; ``tokenizer_folder`` is where its language model's tokenizer was read."""

    model: MiniGpt4
    images: ImagePreprocessor
    tokenizer_folder: Path

    @classmethod
    def load(
        cls,
        folder: Path,
        config: dict[str, Any],
        *,
        dtype: torch.dtype,
        device: str | torch.device,
        vision_tower: Path | None,
    ) -> "MiniGpt4Family":
        """From the files of its release, or as alignkd saved it; the tower is always the checkpoint's own."""
        del vision_tower
        released = is_official(config)
        tokenizer_folder = vicuna_folder(folder, config) if released else folder
        tokenizer = load_tokenizer(tokenizer_folder)
        if released:
            model = read_released(folder, config, dtype)
            settings = image_settings(int(model.config.vision_config.image_size))
        else:
            model, settings = read_own(folder, dtype), read_settings(folder)
        check_tokenizer(folder, tokenizer, model.config.text_config.vocab_size)
        model.eval().to(device)
        return cls(model, tokenizer, folder, ImagePreprocessor(settings, "stretch"), tokenizer_folder)

    @property
    def templates(self) -> tuple[str, ...]:
        """The prompt of the release over Vicuna v0."""
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
        """Computed from a black image."""
        return self.model.encode_images(self._black).float().sum() * 0.0

    @property
    def _black(self) -> torch.Tensor:
        side = int(self.model.config.vision_config.image_size)
        return torch.zeros(1, 3, side, side, device=self.device)

    def generation_inputs(self, batch: Batch) -> Mapping[str, Any]:
        """Pixel values, and what ends an answer: the tokenizer has several ways to write ``###``.

        BLIP-2's generation needs an image even where no sample has one; nothing then reads its vision tokens.
        """
        pixels = batch.images if batch.images.numel() else self._black
        return {"pixel_values": pixels.to(self.dtype), "stop_strings": [_END], "tokenizer": self.tokenizer}

    def answer_text(self, ids: list[int]) -> str:
        """An answer without its end mark."""
        return super().answer_text(ids).split(_END)[0].strip()

    def image_fingerprint(self) -> str:
        """Digest of the preprocessing's settings."""
        return self.images.fingerprint()

    def save(self, folder: Path) -> None:
        """In Hugging Face form, all in one folder."""
        self.model.save_pretrained(folder)
        write_settings(self.images, folder)
        copy_tokenizer(self.tokenizer_folder, folder)
