"""The contract every family meets: what Align-KD needs of a vision-language model, and nothing more.

Where its vision tokens stand, what the projector gives, the hidden states that the output head reads, which parts are frozen,
how a conversation becomes ids and labels, and how it is saved. One implementation a family; see :mod:`alignkd.models.families`.

Shapes: B samples, S positions, D width of the language model, M vision tokens of a whole batch, A answers.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from alignkd.inputs.batch import Batch
from alignkd.inputs.encoder import Encoder


@dataclass(frozen=True)
class Vision:
    """Vision tokens of a batch's images, one after the other, ``[M, D]``; ``passed`` is what decoding needs besides."""

    tokens_MD: torch.Tensor
    encoder_outputs: Any = None


@dataclass
class Vlm(ABC):
    """A loaded vision-language model with its tokenizer."""

    family: ClassVar[str]
    without_slice: ClassVar[str] = "slices are made of MobileVLM's parts alone so far"
    """Why its targets cannot be recomputed from a slice of the teacher; empty where they can."""
    one_image: ClassVar[str] = ""
    """Why a sample may not have several images; empty where it may."""
    without_coordinates: ClassVar[str] = ""
    """Why its vision tokens lie nowhere in the image, so that only a model of the same family can be its student."""
    caches_tower: ClassVar[bool] = False
    """Whether batches may carry ready features of the frozen tower instead of pixel values."""

    model: Any
    tokenizer: Any
    folder: Path

    @property
    @abstractmethod
    def templates(self) -> tuple[str, ...]:
        """Prompt templates it knows; the first is its own."""

    @property
    @abstractmethod
    def image_token_id(self) -> int:
        """The id in ``input_ids`` of a place that vision tokens take."""

    @property
    @abstractmethod
    def tokens_per_placeholder(self) -> int:
        """Vision tokens that one such id becomes."""

    @property
    @abstractmethod
    def vision_tokens_per_image(self) -> int | None:
        """V: vision tokens an image becomes, None where that depends on its size."""

    @property
    @abstractmethod
    def tower(self) -> nn.Module:
        """The vision tower, frozen."""

    @property
    @abstractmethod
    def projector(self) -> nn.Module:
        """What turns the tower's features into vision tokens; it is trained."""

    @property
    @abstractmethod
    def decoder(self) -> Any:
        """The language model without its head: ``layers``, each with a ``self_attn``."""

    @abstractmethod
    def encoder(self, template: str, max_length: int) -> Encoder:
        """What makes inputs of samples.

        Raises:
            ValueError: it does not know the template.
        """

    @abstractmethod
    def encode_images(self, batch: Batch) -> Vision | None:
        """Run tower and projector over a batch's images, or the projector over ready features; None without images."""

    @abstractmethod
    def decode(self, batch: Batch, vision: Vision | None, **kwargs: Any) -> torch.Tensor:
        """Last hidden states ``[B, S, D]``, after the final norm; ``kwargs`` go down to each layer's attention function."""

    @abstractmethod
    def zero_projector_loss(self) -> torch.Tensor:
        """Zero, with a zero gradient for the projector: of an image that no sample has."""

    @abstractmethod
    def image_fingerprint(self) -> str:
        """Digest of everything that changes pixel values."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write model, tokenizer and preprocessing so that :func:`alignkd.models.loading.load_vlm` reads them."""

    @property
    def default_template(self) -> str:
        """The template it was trained with."""
        return self.templates[0]

    @property
    def text_config(self) -> Any:
        """Configuration of the language model."""
        return self.model.config.get_text_config()

    @property
    def head(self) -> Any:
        """The output head: a linear layer, whose bias may be None."""
        return self.model.get_output_embeddings()

    @property
    def vocabulary(self) -> int:
        """Width of the output head: logits per position."""
        return int(self.head.weight.shape[0])

    @property
    def hidden_size(self) -> int:
        """D: width of the language model, and of a vision token."""
        return int(self.text_config.hidden_size)

    @property
    def heads(self) -> int:
        """H: attention heads of a decoder layer."""
        return int(self.text_config.num_attention_heads)

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return int(self.text_config.num_hidden_layers)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        """The type of its weights."""
        return self.model.dtype  # type: ignore[no-any-return]

    @property
    def pad_token_id(self) -> int:
        """What fills shorter samples of a batch; masked everywhere."""
        found = self.tokenizer.pad_token_id
        return int(found if found is not None else self.tokenizer.eos_token_id or 0)

    @property
    def end_token_ids(self) -> list[int]:
        """What ends an answer."""
        return [int(self.tokenizer.eos_token_id)]

    def answer_text(self, ids: list[int]) -> str:
        """What generated ids say, without what ends an answer."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip()

    def freeze_tower(self) -> None:
        """Keep the tower as it is: no gradients, evaluation mode; a projector inside of it is trained all the same."""
        trained = [parameter for parameter in self.projector.parameters() if parameter.requires_grad]
        self.tower.requires_grad_(False).eval()
        for parameter in trained:
            parameter.requires_grad_(True)

    def generation_inputs(self, batch: Batch) -> Mapping[str, Any]:
        """What ``model.generate`` takes besides ids and mask."""
        # A batch of text alone must not name pixel values at all: generation would send None through the tower.
        return {"pixel_values": batch.images.to(self.dtype)} if batch.images.numel() else {}

    def tokenizer_fingerprint(self, limit: int | None = None) -> str:
        """Digest of the vocabulary, the special tokens and the ids of a probe text.

        ``limit``: of the ids below it alone, to compare a tokenizer with one that extends it. Then the padding token is left
        out, which takes no part in targets, and so are special tokens in the probe text, around which tokenizers of one
        vocabulary split otherwise.
        """
        tokenizer, words = self.tokenizer, "A probe:  two spaces,\na line, caf\u00e9,"
        ends = [tokenizer.bos_token_id, tokenizer.eos_token_id]
        content: list[Any]
        if limit is None:
            vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
            content = [vocabulary, [*ends, tokenizer.pad_token_id], list(tokenizer(f"{words} </s>end").input_ids)]
        else:
            entries = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number < limit)
            content = [entries, ends, list(tokenizer(words, add_special_tokens=False).input_ids)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def template_fingerprint(self) -> str:
        """Digest of what a template's name does not say; empty where it says all."""
        return ""

    def weights_fingerprint(self) -> str:
        """Digest of every parameter, in the dtype the model was loaded in."""
        return module_fingerprint(self.model)


def fingerprint(settings: Any) -> str:
    """SHA-256 over plain settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


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
