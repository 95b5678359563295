"""MobileVLM V1 and V2: LLaVA's placeholder, a frozen CLIP tower, a projector to a fixed grid, a Llama decoder.

Shapes: N images, P patches, C tower width, V vision tokens an image, D language-model width, B samples, S positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from alignkd.errors import CheckpointError
from alignkd.inputs.batch import Batch
from alignkd.inputs.prompts import TEMPLATES, check_template
from alignkd.models.checkpoints.mobilevlm_layout import describe, read_official, read_own, write_official
from alignkd.models.checkpoints.preprocessor_files import write_settings
from alignkd.models.checkpoints.tokenizer_files import check_tokenizer, copy_tokenizer, load_tokenizer
from alignkd.models.encoders.images import ImagePreprocessor
from alignkd.models.encoders.placeholder import PlaceholderEncoder
from alignkd.models.modules.mobilevlm import MobileVlm
from alignkd.models.teacher_projector import TeacherProjector
from alignkd.models.vlm import Vision, Vlm

_OFFICIAL = "mobilevlm"
"""``model_type`` of the official folders; alignkd's own have :attr:`MobileVlmConfig.model_type`."""


@dataclass
class MobileVlmFamily(Vlm):
    """A loaded MobileVLM with its image preprocessing."""

    caches_tower: ClassVar[bool] = True

    model: MobileVlm
    images: ImagePreprocessor
    official_config: dict[str, Any] | None = None

    @classmethod
    def load(
        cls,
        folder: Path,
        config: dict[str, Any],
        *,
        dtype: torch.dtype,
        device: str | torch.device,
        vision_tower: Path | None,
    ) -> "MobileVlmFamily":
        """From the official layout, or as alignkd saved it; see :class:`alignkd.models.vlm.Vlm`."""
        official = config["model_type"] == _OFFICIAL
        tokenizer = load_tokenizer(folder)
        if official:
            model, images = read_official(folder, config, dtype, vision_tower)
        else:
            model, images = read_own(folder, dtype)
        check_tokenizer(folder, tokenizer, model.config.text_config.vocab_size)
        model.eval().to(device)
        return cls(model, tokenizer, folder, images, official_config=config if official else None)

    @classmethod
    def describe(cls, folder: Path, config: dict[str, Any], *, vision_tower: Path | None) -> "MobileVlmFamily":
        """See :class:`alignkd.models.vlm.Vlm`."""
        model, images = describe(folder, config if config["model_type"] == _OFFICIAL else None, vision_tower)
        return cls(model, load_tokenizer(folder), folder, images)

    @property
    def has_official_layout(self) -> bool:
        """Unless it sees through a teacher's projector, for which the official layout has no place."""
        return self.teacher_projector is None

    def see_through(self, projector: nn.Module, features: Mapping[str, Any], width: int) -> None:
        """See :class:`alignkd.models.vlm.Vlm`."""
        config, model = self.model.config, self.model.model
        config.projector_type, config.projector_grid = features["projector_type"], features["projector_grid"]
        config.teacher_projector_width = width
        seen = TeacherProjector(projector, width, self.hidden_size)
        model.multi_modal_projector = seen.to(self.device, self.dtype)

    @property
    def templates(self) -> tuple[str, ...]:
        """The templates of its training code."""
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
        """CLIP, frozen in MobileVLM's training code and here."""
        tower: nn.Module = self.model.model.vision_tower
        return tower

    @property
    def projector(self) -> nn.Module:
        """LDP or LDPv2, or those of a teacher with a linear map behind."""
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
        """Computed from a black image; behind a teacher's projector, from no token of it."""
        if (seen := self.teacher_projector) is not None:
            nothing: torch.Tensor = seen.map(torch.zeros(1, seen.map.in_features, device=self.device, dtype=self.dtype))
            return nothing.float().sum() * 0.0
        vision, model = self.model.config.vision_config, self.model.model
        shape = (1, vision.num_channels, vision.image_size, vision.image_size)
        with torch.no_grad():
            features_NPC = model.run_tower(torch.zeros(shape, device=self.device))
        zero: torch.Tensor = model.project(features_NPC.to(self.dtype)).float().sum() * 0.0
        return zero

    def run_tower(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """See :class:`alignkd.models.vlm.Vlm`."""
        return self.model.model.run_tower(pixel_values)

    @property
    def tower_feature_shape(self) -> tuple[int, int]:
        """See :class:`alignkd.models.vlm.Vlm`."""
        vision = self.model.config.vision_config
        class_token = int(self.model.config.vision_feature_select_strategy != "default")
        return (vision.image_size // vision.patch_size) ** 2 + class_token, int(vision.hidden_size)

    def image_fingerprint(self) -> str:
        """Digest of the preprocessing's settings."""
        return self.images.fingerprint()

    def save(self, folder: Path) -> None:
        """In Hugging Face form."""
        self.model.save_pretrained(folder)
        write_settings(self.images, folder)
        copy_tokenizer(self.folder, folder)

    def save_official(self, folder: Path) -> None:
        """In the official MobileVLM layout."""
        if not self.has_official_layout:
            raise CheckpointError(
                f"{folder}: a student that sees through its teacher's projector has no official layout, which knows one"
                " projector of the student's own width; save it in Hugging Face form"
            )
        write_official(self.model, folder, original=self.official_config)
        write_settings(self.images, folder)
        copy_tokenizer(self.folder, folder)
