"""A checkpoint's own processor, from its local folder: images with Pillow, and without the video half.

transformers builds the video half of a processor only where torchvision is installed, and pixel values would then differ.
Frames of a video are images here.
"""

import sys
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoImageProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.processing_utils import ProcessorMixin
from transformers.utils import is_torchvision_available

from alignkd.errors import CheckpointError, wrap_errors
from alignkd.extras import require
from alignkd.models.config_files import read_json, short, without_own_code
from alignkd.models.encoders.rgb import MAX_PREPARED_PIXELS, counts_pixels

_NAMED_IN = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
_MAX_SIDE = 2**14
_MAX_TILES = 1024


def load_processor(folder: Path, model_type: str) -> Any:
    """The processor of a checkpoint.

    Raises:
        CheckpointError: transformers knows none for this ``model_type``, or the folder's files do not make one.
    """
    name = _named(folder) or PROCESSOR_MAPPING_NAMES.get(model_type)
    if name is None:
        raise CheckpointError(
            f"{folder}: transformers {transformers.__version__} names no processor for model_type {model_type!r}"
        )
    if name.startswith("SmolVLM"):
        require("num2words", f"{folder}: the processor of SmolVLM")
    kind = without_videos(name)
    if "image_processor" not in kind.get_attributes():
        raise CheckpointError(f"{folder}: its processor ({name}) takes no images, videos alone: it is not supported")
    try:
        with without_own_code(folder):
            processor = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except CheckpointError:
        raise
    except ImportError as error:
        raise CheckpointError(f"{folder}: its processor cannot be made here: {' '.join(str(error).split())[:200]}") from error
    except Exception as error:  # transformers raises many kinds of error on files that are missing or damaged
        if "torchvision" in str(error) and not is_torchvision_available():
            raise CheckpointError(
                f"{folder}: its processor ({name}) reads images with torchvision alone, which is not installed: install the"
                f" torchvision that belongs to torch {torch.__version__} (pip install torchvision)"
            ) from error
        raise CheckpointError(
            f"{folder}: its processor ({name}) cannot be read ({type(error).__name__}: {str(error)[:300]}){_lacking(folder)}"
        ) from error
    with wrap_errors(CheckpointError, f"{folder}: its processor ({name}) cannot be used"):
        _check_sides(folder, processor.image_processor)
        if processor.chat_template is None:
            # Where older releases keep it; a processor reads only its own file.
            processor.chat_template = getattr(processor.tokenizer, "chat_template", None)
        if hasattr(processor, "num_additional_image_tokens") and processor.patch_size is None:
            _complete(processor, folder)
    return processor


def _lacking(folder: Path) -> str:
    """The files that a processor needs of which none is there, for a message."""
    needed = (("tokenizer.json", "tokenizer.model", "vocab.json"), ("preprocessor_config.json", "processor_config.json"))
    lacking = [" or ".join(names) for names in needed if not any((folder / name).is_file() for name in names)]
    return f"; the folder lacks {' and '.join(lacking)}: copy it there" if lacking else ""


def _check_sides(folder: Path, image_processor: Any) -> None:
    """Refuse sizes that would fill the memory with one image."""
    settings = image_processor.to_dict()
    edges = MAX_PREPARED_PIXELS if counts_pixels(image_processor) else _MAX_SIDE
    largest = {"height": _MAX_SIDE, "width": _MAX_SIDE, "shortest_edge": edges, "longest_edge": edges}
    for name in ("size", "crop_size", "pad_size", "max_image_size"):
        sizes = settings.get(name)
        for side, length in sizes.items() if isinstance(sizes, dict) else ():
            if side in largest and length is not None:
                _check_number(folder, f"{side} of the image processor's {name}", length, largest[side])
    for name, most in (("max_patches", _MAX_TILES), ("patch_size", _MAX_SIDE), ("merge_size", _MAX_SIDE)):
        if isinstance(settings.get(name), int):
            _check_number(folder, f"{name} of the image processor", settings[name], most)
    for canvas in settings.get("image_grid_pinpoints") or ():
        for length in canvas:
            _check_number(folder, "a side in the image processor's image_grid_pinpoints", length, _MAX_SIDE)


def _check_number(folder: Path, what: str, value: Any, most: int) -> None:
    if not isinstance(value, int) or not 0 < value <= most:
        raise CheckpointError(f"{folder}: {what} is {short(value)}, expected a whole number from 1 to {most:,}")


def _complete(processor: Any, folder: Path) -> None:
    """Fill in what LLaVA folders older than processor_config.json have only in the model's configuration."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    vision = config.vision_config
    processor.patch_size = vision.patch_size
    processor.vision_feature_select_strategy = getattr(config, "vision_feature_select_strategy", "default")
    processor.num_additional_image_tokens = int(vision.model_type == "clip_vision_model")  # its class token


def _named(folder: Path) -> str | None:
    """The processor that a checkpoint's files name: a LLaVA with Pixtral's tower has Pixtral's processor."""
    for file in _NAMED_IN:
        try:
            name = read_json(folder / file).get("processor_class")
        except CheckpointError:  # it is absent; or damaged, which the processor reports when it is made
            continue
        if isinstance(name, str) and name in PROCESSOR_MAPPING_NAMES.values():
            return name
    return None


def _processor_class(name: str) -> type[Any]:
    if name != "PixtralProcessor" or is_torchvision_available():
        found: type[Any] = getattr(transformers, name)
        return found
    # Its module imports torchvision for one function, which the Pillow half of the image processor has, too.
    home = "transformers.models.pixtral"
    wanted = f"{home}.image_processing_pixtral"
    sys.modules[wanted] = import_module(f"{home}.image_processing_pil_pixtral")
    try:
        found = import_module(f"{home}.processing_pixtral").PixtralProcessor
    finally:
        del sys.modules[wanted]
    return found


@lru_cache
def without_videos(name: str) -> type[Any]:
    """The processor class of a name without its video processor, under the same name: saving writes what was read."""
    original: type[Any] = _processor_class(name)

    class Named(ProcessorMixin):  # type: ignore[misc]
        """Takes what the original's own constructor passes by position, among which its video processor may come first."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            given = {**dict(zip(original.get_attributes(), args, strict=False)), **kwargs}
            given.pop("video_processor", None)
            super().__init__(**given)

    class ImagesOnly(original, Named):  # type: ignore[misc]
        video_processor = SimpleNamespace(num_frames=None, fps=None)  # SmolVLM's chat template asks for these two

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [part for part in original.get_attributes() if part != "video_processor"]

        @classmethod
        def _get_arguments_from_pretrained(cls, path: Any, processor_dict: Any = None, **kwargs: Any) -> list[Any]:
            found: list[Any] = super()._get_arguments_from_pretrained(path, processor_dict, **kwargs)
            index = cls.get_attributes().index("image_processor")
            found[index] = AutoImageProcessor.from_pretrained(path, **{**kwargs, "backend": "pil", "trust_remote_code": False})
            return found

        @classmethod
        def from_args_and_dict(cls, args: Any, processor_dict: Any, **kwargs: Any) -> Any:
            none = {"video_processor": None} if "video_processor" in original.get_attributes() else {}
            named = dict(zip(cls.get_attributes(), args, strict=True))
            return super().from_args_and_dict([], processor_dict | none, **kwargs, **named)

    ImagesOnly.__name__ = ImagesOnly.__qualname__ = original.__name__
    return ImagesOnly
