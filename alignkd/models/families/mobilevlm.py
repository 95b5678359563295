"""MobileVLM behind the contract: LLaVA's placeholder, a frozen CLIP tower, a projector to a fixed grid, a Llama decoder.

Shapes: N images, P patches, C tower width, V vision tokens an image, D language-model width, B samples, S positions.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from alignkd.inputs.batch import Batch
from alignkd.inputs.prompts import TEMPLATES, check_template
from alignkd.models.checkpoints.mobilevlm_layout import copy_tokenizer, write_official
from alignkd.models.encoders.images import ImagePreprocessor
from alignkd.models.encoders.placeholder import PlaceholderEncoder
from alignkd.models.modules.mobilevlm import MobileVlm
from alignkd.models.vlm import Vision, Vlm


@dataclass
class MobileVlmFamily(Vlm):
    """A loaded MobileVLM with its image preprocessing."""

    family: ClassVar[str] = "mobilevlm"
    without_slice: ClassVar[str] = ""
    caches_tower: ClassVar[bool] = True

    model: MobileVlm
    images: ImagePreprocessor
    official_config: dict[str, Any] | None = None

    @property
    def templates(self) -> tuple[str, ...]:
        """Those of its training code."""
        return TEMPLATES

    @property
    def image_token_id(self) -> int:
        """LLaVA's placeholder, outside the vocabulary."""
        return int(self.model.config.image_token_id)

    @property
    def tokens_per_placeholder(self) -> int:
        """One placeholder an image."""
        return self.vision_tokens_per_image

    @property
    def vision_tokens_per_image(self) -> int:
        """V: all cells of the projector's grid."""
        return self.model.config.vision_tokens_per_image

    @property
    def vision_grid(self) -> tuple[int, int]:
        """Rows and columns of one image's vision tokens."""
        side = int(self.model.config.projector_grid)
        return side, side

    @property
    def tower(self) -> nn.Module:
        """Frozen in MobileVLM's training code and here."""
        tower: nn.Module = self.model.model.vision_tower
        return tower

    @property
    def projector(self) -> nn.Module:
        """LDP or LDPv2."""
        projector: nn.Module = self.model.model.multi_modal_projector
        return projector

    @property
    def decoder(self) -> Any:
        """Llama."""
        return self.model.model.language_model

    def encoder(self, template: str, max_length: int) -> PlaceholderEncoder:
        """See :class:`alignkd.models.vlm.Vlm`."""
        check_template(template, self.templates)
        return PlaceholderEncoder(self.tokenizer, self.images, template, max_length, self.tokens_per_placeholder)

    def encode_images(self, batch: Batch) -> Vision | None:
        """``batch.images`` are pixel values ``[N, 3, h, w]`` or, where the frozen tower already ran, features ``[N, P, C]``."""
        tokens_NVD = self.model.model.encode_images(batch.images)
        return None if tokens_NVD is None else Vision(tokens_NVD.flatten(0, 1))

    def decode(self, batch: Batch, vision: Vision | None, **kwargs: Any) -> torch.Tensor:
        """See :class:`alignkd.models.vlm.Vlm`."""
        tokens_MD = None if vision is None else vision.tokens_MD
        return self.model.model.decode(batch.input_ids_BS, batch.attention_mask_BS, tokens_MD, batch.vision_positions, **kwargs)

    def zero_projector_loss(self) -> torch.Tensor:
        """Of a black image."""
        vision, model = self.model.config.vision_config, self.model.model
        shape = (1, vision.num_channels, vision.image_size, vision.image_size)
        with torch.no_grad():
            features_NPC = model.run_tower(torch.zeros(shape, device=self.device))
        nothing: torch.Tensor = model.project(features_NPC.to(self.dtype)).float().sum() * 0.0
        return nothing

    def image_fingerprint(self) -> str:
        """Of the preprocessing's settings."""
        return self.images.fingerprint()

    def save(self, folder: Path) -> None:
        """In Hugging Face form."""
        self.model.save_pretrained(folder)
        self._save_preprocessing(folder)

    def save_official(self, folder: Path) -> None:
        """In the official MobileVLM layout."""
        write_official(self.model, folder, tower_name="./clip", original=self.official_config)
        (folder / "clip").mkdir(exist_ok=True)
        (folder / "clip" / "config.json").write_text(self.model.config.vision_config.to_json_string())
        self._save_preprocessing(folder)

    def _save_preprocessing(self, folder: Path) -> None:
        (folder / "preprocessor_config.json").write_text(
            json.dumps({"image_processor_type": "CLIPImageProcessor", **self.images.settings}, indent=2)
        )
        copy_tokenizer(self.folder, folder)
