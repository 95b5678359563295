"""What most families of transformers share: one image token for each vision token, and an image encoder that can run alone.

A family adds what differs: where its parts are, and where its vision tokens lie in an image.

Shapes: S positions, D width of the language model, M vision tokens of a batch.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from alignkd.errors import CheckpointError, wrap_errors
from alignkd.inputs.batch import Batch, ModelInput
from alignkd.inputs.prompts import check_template
from alignkd.inputs.regions import region_without_coordinates
from alignkd.models.checkpoints.state_files import BUFFERS, check_weight_files
from alignkd.models.config_files import check_feature_layers, without_own_code
from alignkd.models.encoders.chat import ChatEncoder
from alignkd.models.encoders.processors import load_processor
from alignkd.models.registry import UNLISTED, find_record
from alignkd.models.vlm import Vision, Vlm, fingerprint

_TOWERS = tuple(f"model.{name}" for name in ("vision_tower", "vision_model", "visual", "vision_encoder"))
_PROJECTORS = tuple(
    f"model.{name}" for name in ("multi_modal_projector", "connector", "aligner", "projector", "embed_vision", "visual.merger")
)


@dataclass
class TransformersVlm(Vlm):
    """A model of :class:`transformers.AutoModelForImageTextToText` with its processor."""

    tower_path: ClassVar[str] = ""
    """Name of the tower in the model; where it is empty, the usual names are tried."""
    projector_path: ClassVar[str] = ""
    """Name of the projector; as ``tower_path``."""
    encoder_class: ClassVar[type[ChatEncoder]] = ChatEncoder

    processor: Any

    @classmethod
    def load(
        cls,
        folder: Path,
        config: dict[str, Any],
        *,
        dtype: torch.dtype,
        device: str | torch.device,
        vision_tower: Path | None,
    ) -> "TransformersVlm":
        """See :class:`alignkd.models.vlm.Vlm`; the tower is always the checkpoint's own."""
        del vision_tower
        kind = str(config["model_type"])
        if find_record(kind) is UNLISTED and kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            raise CheckpointError(
                f"{folder}/config.json: model_type is {kind!r}, which is no vision-language model known here: alignkd models"
                " lists those that are"
            )
        check_feature_layers(config, folder / "config.json")
        processor = load_processor(folder, kind)
        if "quantization_config" not in config:
            check_weight_files(folder)
        # transformers raises many kinds of error on files that are missing or damaged.
        with wrap_errors(CheckpointError, f"{folder}: the model cannot be read"), without_own_code(folder):
            model, found = AutoModelForImageTextToText.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # to name them
            )
        _check_loaded(folder, found)
        model.eval().to(device)
        vlm = cls(model, processor.tokenizer, folder, processor)
        vlm.check()
        return vlm

    @classmethod
    def describe(cls, folder: Path, config: dict[str, Any], *, vision_tower: Path | None) -> "TransformersVlm":
        """See :class:`alignkd.models.vlm.Vlm`."""
        del vision_tower
        processor = load_processor(folder, str(config["model_type"]))
        with wrap_errors(CheckpointError, f"{folder}: the model cannot be made"), torch.device("meta"):
            found = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            model = AutoModelForImageTextToText.from_config(found, trust_remote_code=False)
        return cls(model, processor.tokenizer, folder, processor)

    @property
    def templates(self) -> tuple[str, ...]:
        """The chat template of its processor, and LLaVA's prompt."""
        return "chat", "v1"

    @property
    def image_token_id(self) -> int:
        """The id that stands for one vision token."""
        config = self.model.config
        found = getattr(config, "image_token_id", None)
        return int(found if found is not None else config.image_token_index)

    @property
    def tokens_per_placeholder(self) -> int:
        """Its processor writes one id for each vision token."""
        return 1

    @property
    def vision_tokens_per_image(self) -> int | None:
        """It may depend on the image."""
        return None

    @property
    def tower(self) -> nn.Module:
        """The vision tower, under the name of its family or a usual one."""
        return self._part(self.tower_path, _TOWERS)

    @property
    def projector(self) -> nn.Module:
        """The projector, under the name of its family or a usual one."""
        return self._part(self.projector_path, _PROJECTORS)

    def _part(self, path: str, usual: tuple[str, ...]) -> nn.Module:
        for name in [path] if path else usual:
            try:
                found: nn.Module = self.model.get_submodule(name)
            except AttributeError:
                continue
            return found
        raise AttributeError(f"none of {', '.join(usual)}")

    @property
    def decoder(self) -> Any:
        """The language model without its head."""
        return self.model.get_decoder()

    @property
    def end_token_ids(self) -> list[int]:
        """The end tokens of its generation settings, and the tokenizer's."""
        found = self.model.generation_config.eos_token_id
        ids = {*(found if isinstance(found, list) else [found]), self.tokenizer.eos_token_id}
        return sorted(int(token) for token in ids if token is not None)

    def encoder(self, template: str, max_length: int) -> ChatEncoder:
        """See :class:`alignkd.models.vlm.Vlm`."""
        check_template(template, self.templates)
        return self.encoder_class(
            self.folder,
            self.model.config.model_type,
            self.image_token_id,
            self._image_inputs | {"pixel_values"},
            self.regions,
            max_length,
            template,
            processor=self.processor,
        )

    @staticmethod
    def regions(
        processor: Any,
        outputs: Mapping[str, Any],
        index: int,
        size: tuple[int, int],
        tokens: int,
    ) -> list[np.ndarray]:
        """No coordinates, where a family does not say more."""
        return [region_without_coordinates(index, tokens)]

    def check(self) -> None:
        """Refuse a model that does not fulfil the contract, before any data is read.

        Raises:
            CheckpointError: names what is missing, or what is wrong with its prompts.
        """
        kind = self.model.config.model_type
        with wrap_errors(CheckpointError, f"{self.folder}: a model of type {kind!r} lacks what Align-KD needs"):
            missing = [part for part, there in self._parts().items() if not there]
        if missing:
            raise CheckpointError(f"{self.folder}: a model of type {kind!r} lacks {', '.join(missing)}: it is not supported")
        self._check_prompts()

    def _check_prompts(self) -> None:
        """Make one prompt: the tokenizer, processor, template and settings are read here for the first time."""
        try:
            prompt, _ = self._grey, self.end_token_ids
        except MemoryError:
            raise
        except Exception as error:
            raise CheckpointError(f"{self.folder}: prompts of this model cannot be made: {str(error)[:300]}") from error
        if not len(prompt.images):
            raise CheckpointError(f"{self.folder}: its processor gives no pixel values for an image; is it another model's?")

    def _parts(self) -> dict[str, bool]:
        """What the contract needs of a model, and whether it is there."""
        base = getattr(self.model, "model", None)
        takes = inspect.signature(base.forward).parameters if base is not None else {}
        layers = getattr(self.model.get_decoder(), "layers", None)
        ids = ("image_token_id", "image_token_index")
        return {
            "an image encoder that runs alone": hasattr(base, "get_image_features") and "mm_encoder_outputs" in takes,
            f"a vision tower by one of the names {', '.join(_TOWERS)}": hasattr(self, "tower"),
            f"a projector by one of the names {', '.join(_PROJECTORS)}": hasattr(self, "projector"),
            "self-attention in its first layer": layers is not None and len(layers) > 0 and hasattr(layers[0], "self_attn"),
            "an id that stands for vision tokens": any(getattr(self.model.config, name, None) is not None for name in ids),
            "an output head": self.head is not None,
        }

    def encode_images(self, batch: Batch) -> Vision | None:
        """Run the model's own image encoder.

        Raises:
            CheckpointError: it gives more or fewer vision tokens than the processor wrote placeholders.
        """
        if not batch.images.numel():
            return None
        given = {name: value for name, value in batch.image_inputs.items() if name in self._feature_inputs}
        features = self.model.model.get_image_features(pixel_values=self._pixels(batch), **given, return_dict=True)
        tokens_MD = _flat(features.pooler_output)
        if len(tokens_MD) != len(batch.vision_positions):
            raise CheckpointError(
                f"{self.folder}: the model gives {len(tokens_MD)} vision tokens for {len(batch.vision_positions)} placeholders"
                f" in the prompt (id {self.image_token_id}): the processor's settings (such as patch_size in"
                " processor_config.json) or image_token_id in config.json are of another checkpoint"
            )
        return Vision(tokens_MD, features)

    def decode(self, batch: Batch, vision: Vision | None, **kwargs: Any) -> torch.Tensor:
        """See :class:`alignkd.models.vlm.Vlm`."""
        given: dict[str, Any] = {name: value for name, value in self._extra(batch).items() if name in self._forward_inputs}
        if vision is not None:
            given["mm_encoder_outputs"] = {"image": vision.encoder_outputs}
        output = self.model.model(
            input_ids=batch.input_ids_BS, attention_mask=batch.attention_mask_BS.long(), use_cache=False, **given, **kwargs
        )
        hidden_BSD: torch.Tensor = output.last_hidden_state
        return hidden_BSD

    def zero_projector_loss(self) -> torch.Tensor:
        """Computed from a grey image."""
        return self._encode_grey_image().tokens_MD.float().sum() * 0.0

    def _encode_grey_image(self) -> Vision:
        vision = self.encode_images(self.collate([self._grey]).to(self.device))
        assert vision is not None, "the batch has an image"
        return vision

    @cached_property
    def _grey(self) -> ModelInput:
        own = "v1" if self.processor.chat_template is None and "v1" in self.templates else self.default_template
        encoder = self.encoder(own, 2**20)
        return encoder.question([("human", "<image>\na"), ("gpt", "b")], [Image.new("RGB", (64, 64), (128, 128, 128))])

    def generation_inputs(self, batch: Batch) -> Mapping[str, Any]:
        """See :class:`alignkd.models.vlm.Vlm`."""
        pixels = {"pixel_values": self._pixels(batch)} if batch.images.numel() else {}
        return {**pixels, **self._extra(batch)}

    def image_fingerprint(self) -> str:
        """Digest of the image processor's settings."""
        return fingerprint(self.processor.image_processor.to_dict())

    def template_fingerprint(self) -> str:
        """Digest of the chat template."""
        return fingerprint(self.processor.chat_template)

    def save(self, folder: Path) -> None:
        """In the form of transformers."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    def _pixels(self, batch: Batch) -> torch.Tensor:
        return batch.images.to(self.dtype)

    def _extra(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {**batch.image_inputs, **batch.token_inputs}

    @cached_property
    def _feature_inputs(self) -> frozenset[str]:
        return frozenset(inspect.signature(self.model.model.get_image_features).parameters)

    @cached_property
    def _forward_inputs(self) -> frozenset[str]:
        return frozenset(inspect.signature(self.model.model.forward).parameters)

    @property
    def _image_inputs(self) -> frozenset[str]:
        return self._feature_inputs | self._forward_inputs


def _check_loaded(folder: Path, found: Mapping[str, Any]) -> None:
    """Refuse weights that are not exactly the model's, each of its shape.

    Raises:
        CheckpointError: names the first ones.
    """
    misshapen = [f"{name} is {tuple(found)}, expected {tuple(expected)}" for name, found, expected in found["mismatched_keys"]]
    unexpected = [name for name in found["unexpected_keys"] if not BUFFERS.search(name)]
    for what, names in (
        ("missing keys", list(found["missing_keys"])),
        ("unexpected keys", unexpected),
        ("keys that do not match the configuration", misshapen),
        ("keys that cannot be read", [str(message) for message in found.get("error_msgs", ())]),
    ):
        if names:
            more = " ..." if len(names) > 4 else ""
            raise CheckpointError(f"{folder}: the weights have {what}: {', '.join(sorted(names)[:4])}{more}")


def _flat(features: Any) -> torch.Tensor:
    """Features of all images, a tensor or nested lists of tensors, as ``[M, D]``."""
    if isinstance(features, torch.Tensor):
        return features.reshape(-1, features.shape[-1])
    return torch.cat([_flat(part) for part in features])
