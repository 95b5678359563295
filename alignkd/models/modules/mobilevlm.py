"""MobileVLM as transformers' LLaVA with its own projector: generation, KV cache, saving, PEFT and Trainer come from there.

Shapes: N images, P patches, C tower width, V vision tokens an image, M of all images, D language-model width, B samples,
S positions.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaModel

from alignkd.inputs.prompts import IMAGE_TOKEN_ID
from alignkd.models.modules.embedding import PlaceholderEmbedding, insert
from alignkd.models.modules.ldpv1 import LdpV1Projector, ldpv1_grid
from alignkd.models.modules.ldpv2 import LdpV2Projector
from alignkd.models.teacher_projector import TeacherProjector


class MobileVlmConfig(LlavaConfig):  # type: ignore[misc]
    """LLaVA's configuration with the projector (``ldpnet`` in V1, ``ldpnetv2`` in V2) and how images become square.

    ``projector_grid``: side of the grid of vision tokens. LDPv2 pools to any; LDP halves the grid of patches.
    ``teacher_projector_width``: above 0, the projector is that of a teacher of this width, and a linear map follows it
    (:mod:`alignkd.models.teacher_projector`).
    """

    model_type = "mobilevlm_v2"

    projector_type: str = "ldpnetv2"
    projector_grid: int = 12
    teacher_projector_width: int = 0
    image_aspect_ratio: str = "pad"
    image_token_index: int = IMAGE_TOKEN_ID

    @property
    def vision_tokens_per_image(self) -> int:
        """V: vision tokens one image becomes."""
        return int(self.projector_grid) ** 2


PROJECTORS = ("ldpnet", "ldpnetv2")
"""Names of the known projectors, as ``mm_projector_type`` in official configurations."""


def new_projector(config: MobileVlmConfig) -> nn.Module:
    """The projector that a configuration names, its weights drawn at random as PyTorch's layers do.

    Raises:
        ValueError: no such projector, or a grid that it cannot give.
    """
    width = config.text_config.hidden_size
    if teacher_width := config.teacher_projector_width:
        return TeacherProjector(_new_projector(config, teacher_width), teacher_width, width)
    return _new_projector(config, width)


def _new_projector(config: MobileVlmConfig, width: int) -> nn.Module:
    vision = config.vision_config
    if config.projector_type == "ldpnetv2":
        return LdpV2Projector(vision.hidden_size, width, config.projector_grid)
    if config.projector_type != "ldpnet":
        raise ValueError(f"projector_type is {config.projector_type!r}; known are {', '.join(PROJECTORS)}")
    grid = ldpv1_grid(vision.image_size, vision.patch_size)
    if config.projector_grid != grid:
        raise ValueError(f"projector_grid is {config.projector_grid}, but ldpnet gives {grid} x {grid} vision tokens here")
    return LdpV1Projector(vision.hidden_size, width)


class MobileVlmModel(LlavaModel):  # type: ignore[misc]
    """Tower, projector and Llama decoder."""

    config: MobileVlmConfig

    def __init__(self, config: MobileVlmConfig) -> None:
        super().__init__(config)
        text = config.text_config
        self.multi_modal_projector = new_projector(config)
        self.language_model.set_input_embeddings(
            PlaceholderEmbedding(text.vocab_size, text.hidden_size, padding_idx=text.pad_token_id)
        )
        self.post_init()

    def run_tower(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Tower features of the selected layer, without the class token: ``[N, 3, h, w] -> [N, P, C]``."""
        dtype = self.vision_tower.dtype
        hidden_states = self.vision_tower(pixel_values.to(dtype), output_hidden_states=True).hidden_states
        features: torch.Tensor = hidden_states[self.config.vision_feature_layer]
        return features[:, 1:] if self.config.vision_feature_select_strategy == "default" else features

    def project(self, features_NPC: torch.Tensor) -> torch.Tensor:
        """Vision tokens as they enter the language model: ``[N, P, C] -> [N, V, D]``."""
        tokens: torch.Tensor = self.multi_modal_projector(features_NPC)
        return tokens

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """LLaVA's entry point: the vision tokens as ``pooler_output``, a list of ``[V, D]``, one an image.

        ``pixel_values`` are ``[N, 3, h, w]`` or, where the frozen tower already ran, its features ``[N, P, C]``.
        """
        features_NPC = pixel_values if pixel_values.dim() == 3 else self.run_tower(pixel_values)
        vision_tokens_NVD = self.project(features_NPC)
        return BaseModelOutputWithPooling(last_hidden_state=None, pooler_output=list(vision_tokens_NVD))

    def encode_images(self, images: torch.Tensor) -> torch.Tensor | None:
        """Vision tokens ``[N, V, D]`` of pixel values or of ready features; None where there are no images."""
        if not images.numel():
            return None
        features_NPC = images if images.dim() == 3 else self.run_tower(images)
        return self.project(features_NPC.to(self.dtype))

    def embed(
        self, input_ids_BS: torch.Tensor, vision_tokens_MD: torch.Tensor | None, vision_positions: torch.Tensor
    ) -> torch.Tensor:
        """What enters the first layer ``[B, S, D]``: vision tokens lie at positions of a flattened ``[B * S]``.

        The positions are known on the host, so nothing waits for the device; LLaVA's own placeholder check would.
        """
        embeddings_BSD: torch.Tensor = self.get_input_embeddings()(input_ids_BS)
        return insert(embeddings_BSD, vision_tokens_MD, vision_positions)

    def decode(
        self,
        input_ids_BS: torch.Tensor,
        attention_mask_BS: torch.Tensor,
        vision_tokens_MD: torch.Tensor | None,
        vision_positions: torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Last hidden states ``[B, S, D]`` of ids and ready vision tokens (see :meth:`embed`).

        ``kwargs`` go down to the attention function of each layer.
        """
        embeddings_BSD = self.embed(input_ids_BS, vision_tokens_MD, vision_positions)
        output = self.language_model(inputs_embeds=embeddings_BSD, attention_mask=attention_mask_BS, use_cache=False, **kwargs)
        hidden_BSD: torch.Tensor = output.last_hidden_state
        return hidden_BSD


class MobileVlm(LlavaForConditionalGeneration):  # type: ignore[misc]
    """MobileVLM with its output head."""

    config_class = MobileVlmConfig
    config: MobileVlmConfig

    def __init__(self, config: MobileVlmConfig) -> None:
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = MobileVlmModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register(MobileVlmConfig.model_type, MobileVlmConfig)
AutoModel.register(MobileVlmConfig, MobileVlmModel)
AutoModelForImageTextToText.register(MobileVlmConfig, MobileVlm)
