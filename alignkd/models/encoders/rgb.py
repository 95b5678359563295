"""Any image to RGB as a model's own loader makes it.

Files have transparency, palettes, 16 bits a channel, an orientation. transformers turns an image upright where it opens the
file (``load_image``), and its image processors lay transparency on white. The training code of LLaVA, MobileVLM and MiniGPT-4
does neither: it takes what Pillow's ``convert("RGB")`` gives.
"""

import sys
from typing import Any

from PIL import Image
from transformers.image_transforms import convert_to_rgb

from alignkd.models.encoders.image_files import ImageError, read_pixels, upright
from alignkd.models.encoders.pillow_rgb import converted

MAX_PREPARED_PIXELS = 2**27
"""An image that padding or resizing would make larger than this (11,585 x 11,585) is rejected."""


def rgb_by_processor(image: Image.Image, image_processor: Any) -> Image.Image:
    """What transformers makes of a file: upright, and RGB in the way of the model's image processor.

    A processor that converts nothing itself (``do_convert_rgb`` is false) is given what ``load_image`` gives.

    Raises:
        ImageError: it is damaged or cut short.
    """
    image = upright(read_pixels(image))
    if image.mode == "RGB" and image.info.get("transparency") is None:
        return image
    if not getattr(image_processor, "do_convert_rgb", True):
        return converted(image)
    try:
        own = getattr(image_processor, "convert_to_rgb", None)
        return Image.fromarray(own(image) if own is not None else convert_to_rgb(image, return_numpy=True))
    except (ValueError, TypeError) as error:
        raise ImageError(f"an image of mode {image.mode} cannot become RGB ({error})") from error


def check_after_padding(size: tuple[int, int]) -> None:
    """Refuse an image whose square would be too large.

    Raises:
        ImageError: names both sizes.
    """
    side = max(size)
    if side**2 > MAX_PREPARED_PIXELS:
        raise ImageError(
            f"{size[0]} x {size[1]} pixels, {side:,} x {side:,} when padded to a square, more than {MAX_PREPARED_PIXELS:,};"
            " cut it, or make it smaller"
        )


def check_after_resizing(size: tuple[int, int], shortest_edge: int) -> None:
    """Refuse an image that would be too large with a shortest edge of so many pixels.

    Raises:
        ImageError: names both sizes.
    """
    scale = shortest_edge / max(min(size), 1)
    if size[0] * size[1] * scale**2 > MAX_PREPARED_PIXELS:
        raise ImageError(
            f"{size[0]} x {size[1]} pixels, {round(size[0] * scale):,} x {round(size[1] * scale):,} when its shortest edge is"
            f" resized to {shortest_edge}, more than {MAX_PREPARED_PIXELS:,}; cut it"
        )


def check_prepared(size: tuple[int, int], image_processor: Any, *, several: bool = False) -> None:
    """Refuse an image that a processor of transformers would make too large, before it is decoded.

    ``several``: it is one of several of a sample, which LLaVA-OneVision pads to squares.

    Raises:
        ImageError: names both sizes.
    """
    name = type(image_processor).__name__
    padded = name.startswith("LlavaImageProcessor") and getattr(image_processor, "do_pad", None)
    if padded or (several and name.startswith("LlavaOnevision")):
        check_after_padding(size)
        size = (max(size), max(size))
    edge = shortest_edge_alone(image_processor)
    if edge is not None:
        check_after_resizing(size, edge)


def shortest_edge_alone(image_processor: Any) -> int | None:
    """The length that a processor gives an image's shortest edge, the other following; None where that is bounded, too."""
    size = getattr(image_processor, "size", None)
    if size is None or not getattr(image_processor, "do_resize", True) or hasattr(image_processor, "image_grid_pinpoints"):
        return None
    shortest, longest = (getattr(size, name, None) for name in ("shortest_edge", "longest_edge"))
    return int(shortest) if shortest and not longest else None


def counts_pixels(image_processor: Any) -> bool:
    """Whether a processor's shortest and longest edge are numbers of pixels of the whole image, as Qwen2-VL's."""
    return hasattr(sys.modules.get(type(image_processor).__module__), "smart_resize")
