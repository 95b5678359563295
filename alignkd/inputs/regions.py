"""Coordinates of vision tokens: where they lie in their images.

A sample's vision tokens are those of its regions, one after the other. A region is a grid of tokens, row by row, over a box
of an image. A model with tiles has several regions per image. A separator after each row, or a token about the whole image,
has no coordinates.

Shapes: R regions, V vision tokens of a sample.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

SquareMode = Literal["pad", "crop", "stretch"]
"""How an image becomes square: ``pad`` adds borders, ``crop`` takes the central square, ``stretch`` distorts."""

COLUMNS = ("image", "rows", "columns", "row_ends", "top", "left", "bottom", "right")
"""The columns of a region, float32 ``[R, 8]``: which image of the sample; rows and columns of its grid; tokens without
coordinates after each row; its box in fractions of the image's height and width, which may reach over the image's border.
A region without coordinates has a box of size 0."""

NO_REGIONS = np.zeros((0, len(COLUMNS)), dtype=np.float32)


def region(
    image: int, grid: tuple[int, int], box: tuple[float, float, float, float] = (0, 0, 1, 1), *, row_ends: int = 0
) -> np.ndarray:
    """One region ``[8]``; ``grid`` is (rows, columns), ``box`` (top, left, bottom, right)."""
    return np.asarray([image, *grid, row_ends, *box], dtype=np.float32)


def region_without_coordinates(image: int, tokens: int) -> np.ndarray:
    """A region of tokens without coordinates, ``[8]``."""
    return region(image, (1, tokens), (0, 0, 0, 0))


def square_box(size: tuple[int, int], mode: SquareMode) -> tuple[float, float, float, float]:
    """The box that a square input covers of an image of ``size`` (width, height)."""
    if mode == "stretch":
        return 0.0, 0.0, 1.0, 1.0
    side = max(size) if mode == "pad" else min(size)
    (left, right), (top, bottom) = (((1 - side / n) / 2, (1 + side / n) / 2) for n in size)
    return top, left, bottom, right


def stack(regions: Sequence[np.ndarray]) -> np.ndarray:
    """Regions one after the other, ``[R, 8]``."""
    return np.stack(regions) if len(regions) else NO_REGIONS


def tokens_of(regions_R8: np.ndarray) -> np.ndarray:
    """Vision tokens of each region, ``[R]`` of int64."""
    rows, columns, ends = regions_R8[:, 1:4].astype(np.int64).T
    tokens_R: np.ndarray = rows * (columns + ends)
    return tokens_R


def boxes(regions_R8: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The image ``[V]`` and the box (top, left, bottom, right) ``[V, 4]`` of each vision token; size 0 without coordinates."""
    images, found = [np.zeros(0, np.int64)], [np.zeros((0, 4))]
    for image, rows, columns, ends, top, left, bottom, right in regions_R8.tolist():
        height, width = (bottom - top) / max(rows, 1), (right - left) / max(columns, 1)
        y, x = np.mgrid[0 : int(rows), 0 : int(columns)]
        grid = np.stack([top + y * height, left + x * width, top + (y + 1) * height, left + (x + 1) * width], axis=2)
        grid = np.concatenate([grid, np.zeros((int(rows), int(ends), 4))], axis=1).reshape(-1, 4)
        images.append(np.full(len(grid), int(image)))
        found.append(grid)
    return np.concatenate(images), np.concatenate(found)
