"""A checkpoint's own processor, from its local folder: images by Pillow, and without the video half.

transformers builds the video half of a processor only where torchvision is installed, and pixel values would differ with it:
frames of a video are images here.
"""

from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import transformers
from transformers import AutoImageProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES


def load_processor(folder: Path, model_type: str) -> Any:
    """The processor of a checkpoint.

    Raises:
        ValueError: transformers knows none for this kind of model, or the folder's files do not make one.
    """
    name = PROCESSOR_MAPPING_NAMES.get(model_type)
    if name is None:
        raise ValueError(f"{folder}: transformers {transformers.__version__} has no processor for model_type {model_type!r}")
    try:
        processor = without_videos(name).from_pretrained(folder, local_files_only=True)
    except ImportError as error:
        raise ValueError(f"{folder}: its processor cannot be made here: {' '.join(str(error).split())[:200]}") from error
    except Exception as error:  # transformers raises many kinds of error on files that are missing or damaged
        raise ValueError(
            f"{folder}: its processor ({name}) cannot be read ({type(error).__name__}: {str(error)[:300]}); it needs the"
            " tokenizer's files, preprocessor_config.json and, where the model has one, its chat template"
        ) from error
    if processor.chat_template is None:
        # Where older releases keep it; a processor reads its own file alone.
        processor.chat_template = getattr(processor.tokenizer, "chat_template", None)
    return processor


@lru_cache
def without_videos(name: str) -> type[Any]:
    """The processor class of a name without its video processor, under the same name: saving writes what was read."""
    original: type[Any] = getattr(transformers, name)

    class ImagesOnly(original):  # type: ignore[misc]
        video_processor = SimpleNamespace(num_frames=None, fps=None)  # SmolVLM's chat template asks for these two

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [part for part in original.get_attributes() if part != "video_processor"]

        @classmethod
        def _get_arguments_from_pretrained(cls, path: Any, processor_dict: Any = None, **kwargs: Any) -> list[Any]:
            found: list[Any] = super()._get_arguments_from_pretrained(path, processor_dict, **kwargs)
            place = cls.get_attributes().index("image_processor")
            found[place] = AutoImageProcessor.from_pretrained(path, backend="pil", **kwargs)
            return found

        @classmethod
        def from_args_and_dict(cls, args: Any, processor_dict: Any, **kwargs: Any) -> Any:
            none = {"video_processor": None} if "video_processor" in original.get_attributes() else {}
            return super().from_args_and_dict(args, processor_dict | none, **kwargs)

    ImagesOnly.__name__ = ImagesOnly.__qualname__ = original.__name__
    return ImagesOnly
