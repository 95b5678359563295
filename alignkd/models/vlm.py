"""The contract every family meets: what Align-KD needs of a vision-language model, and nothing more.

Where the vision tokens are (``image_token_id``, ``vision_tokens_per_image``), what the projector gives (``project``),
the first decoder layer's attention module, the output head, the tokenizer and the image preprocessing.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alignkd.models.images import ImagePreprocessor
from alignkd.models.mobilevlm import MobileVlm


@dataclass
class Vlm:
    """A loaded vision-language model with its tokenizer and image preprocessing."""

    model: MobileVlm
    tokenizer: Any
    images: ImagePreprocessor
    folder: Path
    default_template: str = "v1"
    official_config: dict[str, Any] | None = None

    @property
    def image_token_id(self) -> int:
        """The id that stands for an image in ``input_ids``."""
        return int(self.model.config.image_token_id)

    @property
    def vision_tokens_per_image(self) -> int:
        """V: vision tokens one image becomes."""
        return self.model.config.vision_tokens_per_image

    @property
    def vision_grid(self) -> tuple[int, int]:
        """Rows and columns of one image's vision tokens."""
        side = int(self.model.config.projector_grid)
        return side, side

    @property
    def vocabulary(self) -> int:
        """Width of the output head: logits per position."""
        return int(self.model.config.text_config.vocab_size)

    @property
    def hidden_size(self) -> int:
        """D: width of the language model, and of a vision token."""
        return int(self.model.config.text_config.hidden_size)

    @property
    def heads(self) -> int:
        """H: attention heads of a decoder layer."""
        return int(self.model.config.text_config.num_attention_heads)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device  # type: ignore[no-any-return]

    @property
    def tower(self) -> nn.Module:
        """The vision tower, frozen in MobileVLM's training code and here."""
        return self.model.model.vision_tower  # type: ignore[no-any-return]

    def freeze_tower(self) -> None:
        """Keep the tower as it is: no gradients, evaluation mode."""
        self.tower.requires_grad_(False).eval()

    def tokenizer_fingerprint(self) -> str:
        """Digest of the vocabulary, the special tokens and the ids of a probe text."""
        probe = "A probe:  two spaces,\na line, caf\u00e9, </s>end"
        content = [
            sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1]),
            [self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id],
            list(self.tokenizer(probe).input_ids),
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def weights_fingerprint(self) -> str:
        """Digest of every parameter, in the dtype the model was loaded in."""
        return module_fingerprint(self.model)


def module_fingerprint(module: nn.Module, dtype: torch.dtype | None = None) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a module's state, independent of file layout and device.

    ``dtype``: what it would be were the module loaded in another dtype.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        flat = tensor.detach().contiguous().reshape(-1).cpu()
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()
