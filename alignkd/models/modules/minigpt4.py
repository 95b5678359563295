"""MiniGPT-4 as transformers' BLIP-2 with a Llama decoder: EVA-CLIP-g, a Q-Former of 32 queries, one linear layer, Vicuna.

Source: MiniGPT-4 (arXiv 2304.10592); the vision half is BLIP-2's (arXiv 2301.12597), with its released weights.

Shapes: N images, Q queries, D language-model width.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, Blip2Config, Blip2ForConditionalGeneration

from alignkd.inputs.prompts import IMAGE_TOKEN_ID
from alignkd.models.modules.embedding import PlaceholderEmbedding

_FINAL_NORM_EPS = 1e-5
"""Of the norm after the vision tower, in the released code; transformers gives it that of the tower's layers, 1e-6."""


class MiniGpt4Config(Blip2Config):  # type: ignore[misc]
    """BLIP-2's configuration with LLaVA's placeholder, outside the vocabulary."""

    model_type = "minigpt4"

    image_token_index: int = IMAGE_TOKEN_ID


class FrozenVision(nn.Module):
    """What MiniGPT-4 never trains of its vision half: tower, queries and Q-Former, as one module over the same parameters."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vision_model, self.qformer, self.query_tokens = model.vision_model, model.qformer, model.query_tokens


class MiniGpt4(Blip2ForConditionalGeneration):  # type: ignore[misc]
    """MiniGPT-4 with its output head."""

    config_class = MiniGpt4Config
    config: MiniGpt4Config
    _keep_in_fp32_modules = None

    def __init__(self, config: MiniGpt4Config) -> None:
        super().__init__(config)
        text = config.text_config
        self.vision_model.post_layernorm.eps = _FINAL_NORM_EPS
        self.language_model.set_input_embeddings(
            PlaceholderEmbedding(text.vocab_size, text.hidden_size, padding_idx=text.pad_token_id)
        )
        self.post_init()

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Vision tokens of pixel values: ``[N, 3, h, w] -> [N, Q, D]``."""
        tokens: torch.Tensor = self.get_image_features(pixel_values.to(self.dtype), return_dict=True).pooler_output
        return tokens


AutoConfig.register(MiniGpt4Config.model_type, MiniGpt4Config)
AutoModelForImageTextToText.register(MiniGpt4Config, MiniGpt4)
