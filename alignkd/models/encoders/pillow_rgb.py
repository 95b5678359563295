"""Any image to RGB by Pillow alone, and what would not survive that. Needs neither torch nor transformers."""

from PIL import Image

from alignkd.models.encoders.image_files import ImageError, read_pixels

_DEEP = ("I", "F")
_WITH_ALPHA = ("RGBA", "RGBa", "LA", "La", "PA")


def rgb_by_pillow(image: Image.Image) -> Image.Image:
    """What LLaVA's and MobileVLM's training code makes of an opened file.

    Raises:
        ImageError: it is damaged or cut short.
    """
    read_pixels(image)
    return image if image.mode == "RGB" else converted(image)


def converted(image: Image.Image) -> Image.Image:
    """An image in RGB by Pillow's ``convert``.

    Raises:
        ImageError: its mode cannot become RGB.
    """
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ImageError(f"an image of mode {image.mode} cannot become RGB ({error})") from error


def is_deep(image: Image.Image) -> bool:
    """Whether an image has more than 8 bits a channel."""
    return image.mode.startswith(_DEEP)


def has_transparency(image: Image.Image) -> bool:
    """Whether an image has an alpha channel, or a colour that stands for none."""
    return image.mode in _WITH_ALPHA or image.info.get("transparency") is not None


def what_is_lost(image: Image.Image, rgb: Image.Image) -> str:
    """Why the RGB image shows little or nothing of the file's, in words; empty where nothing is wrong."""
    if is_deep(image):
        _, high = (image if image.mode in _DEEP else image.convert("I")).getextrema()
        if isinstance(high, int | float) and high > 255:
            return f"its values reach {high:g}, and RGB cuts them at 255"
    spots = [(x, y) for x in (0, rgb.width // 2, rgb.width - 1) for y in (0, rgb.height // 2, rgb.height - 1)]
    # Of a picture that shows something, some of a few pixels nearly always differ; only then all are looked at.
    if len({rgb.getpixel(spot) for spot in spots}) > 1 and image.mode != "F":
        return ""
    extrema = rgb.getextrema()
    if all(isinstance(band, tuple) and band[1] - band[0] <= int(image.mode == "F") for band in extrema):
        return f"as RGB all of it has one value (the file's mode is {image.mode})"
    return ""
