"""Images to pixel values as the training code of MobileVLM and MiniGPT-4 makes them: RGB by Pillow, then CLIP's processor."""

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from alignkd.errors import CheckpointError, wrap_errors
from alignkd.inputs.regions import SquareMode
from alignkd.models.encoders.pillow_rgb import rgb_by_pillow
from alignkd.models.encoders.rgb import check_after_padding, check_prepared

PAD_OWN_MODE = "pad-own-mode"
"""An ``aspect_ratio``: padded in the mode of the file, then converted, as MobileVLM's loader for MMBench does."""

_MAX_SIDE = 4096
"""The largest size that preprocessing may give an image; CLIP's is 336."""

_DECISIVE = (
    "do_convert_rgb",
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
)
"""The settings that change pixel values, defaults included: how a file writes them does not matter."""


@dataclass(frozen=True)
class ImagePreprocessor:
    """Pad to a square with the mean colour (or leave the shape), then CLIP's resize, crop, rescale and normalise.

    ``settings`` are the fields of CLIP's ``preprocessor_config.json``. The PIL implementation is named explicitly because the
    values must not depend on whether torchvision is installed.

    Raises:
        CheckpointError: the settings are not those of a CLIP image processor.
    """

    settings: dict[str, Any]
    aspect_ratio: str

    def __post_init__(self) -> None:
        # Without "image_processor_type" and the like, these are the arguments that the processor itself takes.
        known = {k: v for k, v in self.settings.items() if not k.endswith("_type") and not k.startswith("_")}
        with wrap_errors(CheckpointError, "the settings in preprocessor_config.json are not those of a CLIP image processor"):
            processor = CLIPImageProcessorPil(**known)
            _check_sides(processor)
            object.__setattr__(self, "_processor", processor)
            object.__setattr__(self, "_table_CL", _table(processor))
            self(Image.new("RGB", (32, 32)))

    def decode(self, image: Image.Image) -> Image.Image:
        """The pixels of an opened file, as the training code's loader gives them.

        Raises:
            ImageError: it is damaged, or would be too large when it is padded or resized.
        """
        if self.square_mode == "pad":
            check_after_padding(image.size)
        else:
            check_prepared(image.size, self._processor)  # type: ignore[attr-defined]
        return rgb_by_pillow(image)

    def squared(self, image: Image.Image) -> Image.Image:
        """An opened file as CLIP's processor is given it: laid on a square, or as it is.

        Raises:
            ImageError: as :meth:`decode`.
        """
        if self.square_mode != "pad":
            return image
        colour = tuple(int(mean * 255) for mean in self._processor.image_mean)  # type: ignore[attr-defined]
        rgb = self.decode(image)
        if self.aspect_ratio == PAD_OWN_MODE:
            with suppress(TypeError, ValueError):  # a mode that has no such colour; the reference ends there
                return _pad_to_square(image, colour)
        return _pad_to_square(rgb, colour)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Pixel values ``[3, h, w]``, float32.

        Raises:
            ImageError: as :meth:`decode`.
        """
        image, processor = self.decode(self.squared(image)), self._processor  # type: ignore[attr-defined]
        shaped = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
        assert shaped.dtype == np.uint8, "a resized image has levels, not numbers"
        table_CL: np.ndarray = self._table_CL  # type: ignore[attr-defined]
        pixels = np.empty(shaped.shape, np.float32)
        for levels_hw, values_L, out_hw in zip(shaped, table_CL, pixels, strict=True):
            np.take(values_L, levels_hw, out=out_hw, mode="clip")
        return torch.from_numpy(pixels)

    @property
    def square_mode(self) -> SquareMode:
        """How an image becomes square."""
        return "pad" if self.aspect_ratio in ("pad", PAD_OWN_MODE) else "crop"

    def fingerprint(self) -> str:
        """Digest of everything that changes pixel values."""
        processor = self._processor  # type: ignore[attr-defined]
        resolved = {name: getattr(processor, name, None) for name in _DECISIVE}
        text = json.dumps([self.aspect_ratio, resolved], sort_keys=True, default=_plain)
        return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    return dict(value) if hasattr(value, "keys") else {k: v for k, v in vars(value).items() if v is not None}


def _check_sides(processor: CLIPImageProcessorPil) -> None:
    """Refuse sizes that would fill the memory with one image."""
    for name in ("size", "crop_size"):
        given = getattr(processor, name, None)
        for side, length in (_plain(given) if given is not None else {}).items():
            if not isinstance(length, int) or not 0 < length <= _MAX_SIDE:
                raise CheckpointError(
                    f"preprocessor_config.json: {side} of {name} is {length!r}, expected a whole number from 1 to {_MAX_SIDE}"
                )


def _table(processor: CLIPImageProcessorPil) -> np.ndarray:
    """What rescaling and normalising make of each of the 256 levels of each channel, ``[3, 256]``.

    The processor itself computes the table, so a look-up gives exactly its numbers, in half of its time.
    """
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (1, 256, 3))
    found = processor(Image.fromarray(ramp.copy()), do_resize=False, do_center_crop=False, return_tensors="np")
    table_CL: np.ndarray = found["pixel_values"][0][:, 0].astype(np.float32)
    return table_CL


def _pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new(image.mode, (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def to_display(pixel_values: torch.Tensor, preprocessor: ImagePreprocessor) -> np.ndarray:
    """Undo the normalisation, to show an image: ``[3, h, w] -> [h, w, 3]``, values in 0..1."""
    processor = preprocessor._processor  # type: ignore[attr-defined]
    mean = torch.tensor(processor.image_mean)[:, None, None]
    std = torch.tensor(processor.image_std)[:, None, None]
    shown: np.ndarray = (pixel_values * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
    return shown
