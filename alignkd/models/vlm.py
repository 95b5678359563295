"""The contract of every model family: what Align-KD needs of a vision-language model, and nothing more.

Where its vision tokens stand, what the projector gives, the hidden states that the output head reads, which parts are frozen,
how a conversation becomes ids and labels, and how it is loaded and saved. Each family in :mod:`alignkd.models.families`
implements it; what can be said of a family without loading a model is in its record (:mod:`alignkd.models.registry`).

Shapes: B samples, S positions, D width of the language model, M vision tokens of a whole batch, N images, P patches,
C tower width.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from alignkd.errors import CheckpointError, ConfigError
from alignkd.inputs.batch import Batch, Collator, ModelInput
from alignkd.inputs.encoder import Encoder
from alignkd.models.registry import FamilyRecord, find_record
from alignkd.models.teacher_projector import TeacherProjector


@dataclass(frozen=True)
class Vision:
    """Vision tokens of a batch's images, one after the other, ``[M, D]``; ``encoder_outputs`` is what else decoding needs."""

    tokens_MD: torch.Tensor
    encoder_outputs: Any = None


@dataclass
class Vlm(ABC):
    """A loaded vision-language model with its tokenizer."""

    caches_tower: ClassVar[bool] = False
    """Whether batches may carry ready features of the frozen tower instead of pixel values."""
    model: Any
    tokenizer: Any
    folder: Path
    logit_scale: float = field(default=1.0, init=False)
    """The head over the last hidden states times this gives the model's logits; set by the capture, which compares them."""
    captures: bool = field(default=False, init=False)
    """Whether what is captured of this model was compared with the model itself."""
    tower_aside: Any = field(default=None, init=False)
    """Where its tower is, if not in memory: see :mod:`alignkd.models.tower_aside`."""

    @classmethod
    @abstractmethod
    def load(
        cls,
        folder: Path,
        config: dict[str, Any],
        *,
        dtype: torch.dtype,
        device: str | torch.device,
        vision_tower: Path | None,
    ) -> "Vlm":
        """Load a checkpoint folder, of which ``config`` is the ``config.json``.

        ``vision_tower``: folder of a tower that the checkpoint lacks.

        Raises:
            CheckpointError: a file is missing or damaged, or the files do not belong together.
        """

    @classmethod
    def describe(cls, folder: Path, config: dict[str, Any], *, vision_tower: Path | None) -> "Vlm | None":
        """The model without its weights (on the device "meta"), from the other files of a folder; None where a family cannot.

        Raises:
            CheckpointError: as :meth:`load`.
        """
        del folder, config, vision_tower
        return None

    @property
    def has_official_layout(self) -> bool:
        """Whether it can be saved in the layout of its official release, too."""
        return False

    @property
    def record(self) -> FamilyRecord:
        """What is said of its family in the registry."""
        return find_record(self.model.config.model_type)

    @property
    def family(self) -> str:
        """The family's name."""
        return self.record.family

    @property
    def without_slice(self) -> str:
        """Why its targets cannot be recomputed from a slice of the teacher; empty where they can."""
        return self.record.without_slice

    @property
    def without_coordinates(self) -> str:
        """Why its vision tokens have no coordinates in the image; empty where they have."""
        return self.record.without_coordinates

    @property
    @abstractmethod
    def templates(self) -> tuple[str, ...]:
        """Prompt templates it knows; the first is its own."""

    @property
    @abstractmethod
    def image_token_id(self) -> int:
        """The id in ``input_ids`` that vision tokens replace."""

    @property
    @abstractmethod
    def tokens_per_placeholder(self) -> int:
        """Vision tokens that replace one image token id."""

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
        """What turns samples into inputs.

        Raises:
            ConfigError: it does not know the template.
        """

    @abstractmethod
    def encode_images(self, batch: Batch) -> Vision | None:
        """Run tower and projector over a batch's images, or the projector over ready features; None without images."""

    @abstractmethod
    def decode(self, batch: Batch, vision: Vision | None, **kwargs: Any) -> torch.Tensor:
        """Last hidden states ``[B, S, D]``, after the final norm; ``kwargs`` go down to each layer's attention function."""

    @abstractmethod
    def zero_projector_loss(self) -> torch.Tensor:
        """Zero, with a zero gradient for the projector: computed from an image that belongs to no sample."""

    @abstractmethod
    def image_fingerprint(self) -> str:
        """Digest of everything that changes pixel values."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write model, tokenizer and preprocessing so that :func:`alignkd.models.loading.load_vlm` reads them."""

    @property
    def teacher_projector(self) -> TeacherProjector | None:
        """The teacher's projector and the map behind it, where the model sees through them; else None."""
        return self.projector if isinstance(self.projector, TeacherProjector) else None

    def see_through(self, projector: nn.Module, features: Mapping[str, Any], width: int) -> None:
        """Replace the projector by a teacher's, frozen, and a new linear map behind it.

        ``features``: the settings of the teacher's projector, by their names in its configuration; ``width``: the teacher's.

        Raises:
            ConfigError: the family has no projector that can be another's.
        """
        del projector, features, width
        raise ConfigError(
            f"recipe field projector: the family {self.family} cannot see through a teacher's projector; use projector own"
        )

    def save_official(self, folder: Path) -> None:
        """Write it in the layout of its official release; for families with :attr:`has_official_layout`.

        Raises:
            CheckpointError: the family has no such layout.
        """
        raise CheckpointError(
            f"{folder}: the family {self.family} ({self.folder}) has no official layout; save it in Hugging Face form"
        )

    @property
    def collator(self) -> Collator:
        """What makes batches of its inputs; small, and can be sent to worker processes."""
        return Collator(self.tokens_per_placeholder, self.pad_token_id, self.image_token_id)

    def collate(self, inputs: Sequence[ModelInput], *, pad_left: bool = False) -> Batch:
        """Inputs in one batch, on the host; ``pad_left``: to generate from it."""
        return self.collator(inputs, pad_left=pad_left)

    def run_tower(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Features of the frozen tower: ``[N, 3, h, w] -> [N, P, C]``; for families with :attr:`caches_tower`."""
        raise NotImplementedError(f"the family {self.family} has no tower features apart from its vision tokens")

    @property
    def tower_feature_shape(self) -> tuple[int, int]:
        """P and C: patches and width of one image's tower features; for families with :attr:`caches_tower`."""
        raise NotImplementedError(f"the family {self.family} has no tower features apart from its vision tokens")

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
        """The device the model is on."""
        return self.model.device  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of its weights."""
        return self.model.dtype  # type: ignore[no-any-return]

    @property
    def pad_token_id(self) -> int:
        """The id that pads shorter samples of a batch; masked everywhere."""
        found = self.tokenizer.pad_token_id
        return int(found if found is not None else self.tokenizer.eos_token_id or 0)

    @property
    def end_token_ids(self) -> list[int]:
        """The ids that end an answer."""
        return [int(self.tokenizer.eos_token_id)]

    def answer_text(self, ids: list[int]) -> str:
        """Text of generated ids, without what ends an answer."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip()

    def freeze_tower(self) -> None:
        """Freeze the tower: no gradients, evaluation mode. A projector inside of it is still trained."""
        trained = [parameter for parameter in self.projector.parameters() if parameter.requires_grad]
        self.tower.requires_grad_(False).eval()
        for parameter in trained:
            parameter.requires_grad_(True)

    def generation_inputs(self, batch: Batch) -> Mapping[str, Any]:
        """What ``model.generate`` takes in addition to ids and mask."""
        # A batch of text alone must not name pixel values at all: generation would send None through the tower.
        return {"pixel_values": batch.images.to(self.dtype)} if batch.images.numel() else {}

    def tokenizer_fingerprint(self, limit: int | None = None) -> str:
        """Digest of the vocabulary, the special tokens and the ids of a probe text.

        ``limit``: only of the ids below it, to compare a tokenizer with one that extends it. Then the padding token is left
        out, since no target depends on it, and so are special tokens in the probe text, since tokenizers of one vocabulary
        split differently around them.
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
        """Digest of the prompt template's text; empty where the template's name determines it."""
        return ""

    def weights_fingerprint(self) -> str:
        """Digest of every parameter, in the dtype the model was loaded in."""
        return module_fingerprint(self.model)


def fingerprint(settings: Any) -> str:
    """SHA-256 of plain settings as JSON."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def module_fingerprint(module: nn.Module, dtype: torch.dtype | None = None) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a module's state, independent of file layout and device.

    ``dtype``: as if the module had been loaded in that dtype.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        flat = tensor.detach().contiguous().reshape(-1).cpu()
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()
