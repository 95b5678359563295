"""One image file of each kind that data sets hold, as bytes: modes, transparency, palettes, depths, orientations, frames."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import ExifTags, Image

SIZE = (48, 40)


def pixels(channels: int, seed: int = 0) -> np.ndarray:
    """Smooth and unsymmetric, so that turning, cutting and mixing channels all change something."""
    y, x = np.mgrid[: SIZE[1], : SIZE[0]]
    waves = [np.sin((c + seed + 1) * x / 9 + (c + 2) * y / 13) for c in range(channels)]
    return np.stack([(127.5 * (1 + wave)).astype(np.uint8) for wave in waves], axis=-1).squeeze()


def rgb(seed: int = 0) -> Image.Image:
    return Image.fromarray(pixels(3, seed))


def see_through() -> Image.Image:
    """Colours under every degree of transparency, all of it in the first rows."""
    values = pixels(4)
    values[:10, :, 3] = 0
    return Image.fromarray(values)


def saved(image: Image.Image, file_format: str, **settings: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **settings)
    return buffer.getvalue()


def turned(orientation: int, file_format: str) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return saved(rgb(), file_format, exif=exif)


def several(file_format: str) -> bytes:
    return saved(rgb(), file_format, save_all=True, append_images=[rgb(1), rgb(2)])


def deep(dtype: type, file_format: str) -> bytes:
    ramp = np.linspace(0, 1, SIZE[0] * SIZE[1]).reshape(SIZE[1], SIZE[0])
    return saved(Image.fromarray((ramp if dtype is np.float32 else ramp * 65535).astype(dtype)), file_format)


def see_through_palette() -> Image.Image:
    image = rgb().quantize(16)
    image.info["transparency"] = bytes(range(0, 255, 16))
    return image


KINDS: dict[str, Callable[[], bytes]] = {
    "RGB PNG": lambda: saved(rgb(), "PNG"),
    "RGB JPEG": lambda: saved(rgb(), "JPEG"),
    "progressive JPEG": lambda: saved(rgb(), "JPEG", progressive=True),
    "RGB WebP": lambda: saved(rgb(), "WEBP"),
    "RGB BMP": lambda: saved(rgb(), "BMP"),
    "RGB TIFF": lambda: saved(rgb(), "TIFF"),
    "grey PNG": lambda: saved(rgb().convert("L"), "PNG"),
    "grey JPEG": lambda: saved(rgb().convert("L"), "JPEG"),
    "black and white PNG": lambda: saved(rgb().convert("1"), "PNG"),
    "RGBA PNG": lambda: saved(see_through(), "PNG"),
    "RGBA WebP": lambda: saved(see_through(), "WEBP", lossless=True, exact=True),
    "RGBA TIFF": lambda: saved(see_through(), "TIFF"),
    "grey with alpha PNG": lambda: saved(see_through().convert("LA"), "PNG"),
    "one transparent colour PNG": lambda: saved(rgb(), "PNG", transparency=tuple(pixels(3)[0, 0].tolist())),
    "one transparent grey PNG": lambda: saved(rgb().convert("L"), "PNG", transparency=int(pixels(3)[0, 0, 0])),
    "palette PNG": lambda: saved(rgb().quantize(16), "PNG"),
    "palette with alpha PNG": lambda: saved(see_through_palette(), "PNG"),
    "palette GIF": lambda: saved(rgb().quantize(16), "GIF"),
    "transparent GIF": lambda: saved(rgb().quantize(16), "GIF", transparency=3),
    "CMYK JPEG": lambda: saved(rgb().convert("CMYK"), "JPEG"),
    "CMYK TIFF": lambda: saved(rgb().convert("CMYK"), "TIFF"),
    "YCbCr TIFF": lambda: saved(rgb().convert("YCbCr"), "TIFF"),
    "LAB TIFF": lambda: saved(Image.merge("LAB", rgb().split()), "TIFF"),
    "16 bit PNG": lambda: deep(np.uint16, "PNG"),
    "16 bit TIFF": lambda: deep(np.uint16, "TIFF"),
    "32 bit TIFF": lambda: deep(np.int32, "TIFF"),
    "float TIFF": lambda: deep(np.float32, "TIFF"),
    "animated GIF": lambda: several("GIF"),
    "animated WebP": lambda: several("WEBP"),
    "animated PNG": lambda: several("PNG"),
    "pages of TIFF": lambda: several("TIFF"),
    **{f"orientation {n} JPEG": lambda n=n: turned(n, "JPEG") for n in range(1, 9)},
    **{f"orientation {n} {name}": lambda n=n, name=name: turned(n, name) for n in (3, 6) for name in ("PNG", "WEBP", "TIFF")},
}
