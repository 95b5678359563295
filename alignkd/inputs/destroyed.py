"""An image of which little more than the colours is left: what a teacher says without seeing, in VA-OPD (arXiv 2605.21924).

The size stays, so that any preprocessing, tiles included, makes as many vision tokens of it as of the image itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

SHARE = 0.1
DESTROYED = f"bilinear to {SHARE:g}, nearest back"
"""How :func:`destroy` works, for fingerprints."""


def destroy(image: Image.Image) -> Image.Image:
    """An RGB image scaled to a tenth of each side, at least one pixel, by Pillow's bilinear filter, and back by nearest."""
    from PIL.Image import Resampling  # settings name this module, and they must load at once

    small = max(1, round(image.width * SHARE)), max(1, round(image.height * SHARE))
    return image.resize(small, Resampling.BILINEAR).resize(image.size, Resampling.NEAREST)
