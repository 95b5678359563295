"""Where the tokens of LLaVA's "any resolution" lie: the whole image first, then its tiles joined to one grid.

The image is scaled to fill the middle of a canvas of whole tiles. Grid rows or columns that show only the canvas's border are
dropped, and a separator token follows each row. Source: LLaVA-NeXT's ``spatial_unpad``.
"""

from collections.abc import Sequence

import numpy as np
from transformers.image_processing_utils import select_best_resolution

from alignkd.inputs.regions import region, region_without_coordinates

Box = tuple[float, float, float, float]


def anyres_regions(
    index: int,
    size: tuple[int, int],
    side: int,
    tile: tuple[int, int],
    canvases: Sequence[Sequence[int]],
    *,
    most_tiles: int | None = None,
) -> list[np.ndarray]:
    """Regions of an image of ``size`` (width, height), of which a ``tile`` (height, width) becomes ``side`` x ``side`` tokens.

    ``canvases``: heights and widths to choose from. ``most_tiles``: a grid with more tokens than so many tiles is shrunk.
    """
    width, height = size
    canvas = select_best_resolution([height, width], canvases)
    grid, box = _unpadded((height, width), canvas, (side * (canvas[0] // tile[0]), side * (canvas[1] // tile[1])))
    if most_tiles is not None:
        grid = _shrunk(grid, most_tiles * side**2)
    return [region(index, (side, side)), region(index, grid, box, row_ends=1)]


def single_regions(index: int, side: int, box: Box) -> list[np.ndarray]:
    """Regions of an image without tiles: its tokens, and one separator."""
    return [region(index, (side, side), box), region_without_coordinates(index, 1)]


def _unpadded(size: tuple[int, int], canvas: tuple[int, int], grid: tuple[int, int]) -> tuple[tuple[int, int], Box]:
    """The grid without the canvas's border, and its box in the image; all pairs are (height, width)."""
    wide = size[1] / size[0] > grid[1] / grid[0]
    long, short = (1, 0) if wide else (0, 1)
    shown = int(round(size[short] * (grid[long] / size[long]), 7))
    border = (grid[short] - shown) // 2
    left = list(grid)
    left[short] -= 2 * border
    edges = [(0.0, 1.0), (0.0, 1.0)]
    for axis in (0, 1):
        first = border / grid[axis] * canvas[axis] if axis == short else 0.0
        edges[axis] = _in_image(axis, first, size, canvas)
    (top, bottom), (start, end) = edges
    return (left[0], left[1]), (top, start, bottom, end)


def _in_image(axis: int, first: float, size: tuple[int, int], canvas: tuple[int, int]) -> tuple[float, float]:
    """Where a centred interval of the canvas begins and ends in the image, as fractions of the image's size."""
    scale = min(canvas[0] / size[0], canvas[1] / size[1])
    length = size[axis] * scale
    start = (first - (canvas[axis] - length) / 2) / length
    return start, 1 - start


def _shrunk(grid: tuple[int, int], tokens: int) -> tuple[int, int]:
    """LLaVA-OneVision's ``anyres_max``: a grid with clearly more tokens is scaled down."""
    ratio = (grid[0] * grid[1] / tokens) ** 0.5
    return (int(grid[0] // ratio), int(grid[1] // ratio)) if ratio > 1.1 else grid
