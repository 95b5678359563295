"""Attention drawn over an image; matplotlib set up to draw without a display.

Shapes: H heads, T text rows, V vision columns, R regions of 8 numbers each (see :mod:`alignkd.inputs.regions`).
"""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from alignkd.errors import ConfigError, wrap_errors
from alignkd.inputs.regions import tokens_of
from alignkd.pipeline.runtime.printable import printable, printable_lines

__all__ = ["Figure", "attention_figure", "image_heat", "overlay", "plt", "save_figure", "set_title"]

_COLUMNS = 6
_MOST_HEADS = 34
_MOST_ROWS = 64
_PANEL_INCHES = 1.9
_ROW_INCHES = 0.13

Patch = tuple[np.ndarray, tuple[float, float, float, float]]
"""A heat map ``[rows, columns]`` and its box (top, left, bottom, right) in fractions of the picture."""


def overlay(axes: Axes, picture: np.ndarray, heat: Sequence[Patch], title: str, most: float | None = None) -> None:
    """Draw heat maps over a picture ``[h, w, 3]``, one after the other; white is ``most``, or each one's own largest value."""
    height, width = picture.shape[:2]
    axes.imshow(picture.mean(axis=2), cmap="gray", vmin=0, vmax=1.6, extent=(0, width, height, 0))
    for values, (top, left, bottom, right) in heat:
        extent = (left * width, right * width, bottom * height, top * height)
        # With a scale of its own, a map covers the picture as far as it is attended to.
        alpha = 0.55 if most is None else 0.1 + 0.75 * np.clip(values / most, 0, 1)
        axes.imshow(values, cmap="magma", alpha=alpha, extent=extent, interpolation="nearest", vmin=0, vmax=most)
    tops, lefts, bottoms, rights = zip((0.0, 0.0, 1.0, 1.0), *(box for _, box in heat), strict=True)
    axes.set_xlim(min(lefts) * width, max(rights) * width)
    axes.set_ylim(max(bottoms) * height, min(tops) * height)
    set_title(axes, title)
    axes.set_xticks([])
    axes.set_yticks([])


def set_title(axes: Axes, title: str, size: float = 8) -> None:
    """Write a title that may hold text from others: no formula in it is set, no hidden character drawn."""
    axes.set_title(printable_lines(title), fontsize=size, parse_math=False)


def image_heat(attention_HTV: np.ndarray, regions_R8: np.ndarray, image: int) -> list[Patch]:
    """Attention to one image's regions, averaged over heads and text rows, without tokens that have no coordinates."""
    mean_V, patches = attention_HTV.mean(axis=(0, 1)), []
    ends = np.cumsum(tokens_of(regions_R8))
    for (owner, rows, columns, row_ends, *box), end in zip(regions_R8.tolist(), ends.tolist(), strict=True):
        if int(owner) == image and box[2] > box[0]:
            grid = mean_V[end - int(rows * (columns + row_ends)) : end].reshape(int(rows), -1)[:, : int(columns)]
            patches.append((grid, (box[0], box[1], box[2], box[3])))
    return patches


def attention_figure(
    pictures: Sequence[np.ndarray], attention_HTV: np.ndarray, regions_R8: np.ndarray, title: str, pieces: Sequence[str] = ()
) -> Figure:
    """Each image, the attention to it of all heads and of each, in their order; then each text row over all vision tokens.

    ``pieces``: the text of each row's token ``[T]``; without them, rows have their numbers.
    """
    if not attention_HTV.size:
        return _without_attention(pictures, title)
    heads = min(attention_HTV.shape[0] if attention_HTV.shape[0] > 1 else 0, _MOST_HEADS)
    lines = math.ceil((2 + heads) / _COLUMNS)
    rows = min(attention_HTV.shape[1], _MOST_ROWS)
    heights = [1.0] * (lines * len(pictures)) + [max(rows * _ROW_INCHES, 0.8) / _PANEL_INCHES]
    figure = plt.figure(figsize=(_PANEL_INCHES * _COLUMNS + 1.2, _PANEL_INCHES * sum(heights) + 1.0), layout="constrained")
    grid = figure.add_gridspec(len(heights), _COLUMNS, height_ratios=heights)
    for number, picture in enumerate(pictures):
        places = [grid[number * lines + i // _COLUMNS, i % _COLUMNS] for i in range(2 + heads)]
        _draw_image(figure, [figure.add_subplot(place) for place in places], number, picture, attention_HTV, regions_R8)
    _draw_rows(figure, figure.add_subplot(grid[-1, :]), attention_HTV[:, :rows], attention_HTV.shape[1], regions_R8, pieces)
    figure.suptitle(printable_lines(title), fontsize=10, parse_math=False)
    return figure


def _without_attention(pictures: Sequence[np.ndarray], title: str) -> Figure:
    """The images alone, of a sample that has none or no text after them."""
    figure, axes = plt.subplots(1, max(len(pictures), 1), squeeze=False, layout="constrained")
    for axis, picture in zip(axes[0], pictures, strict=False):
        axis.imshow(picture)
        set_title(axis, "no text after the image")
    for axis in axes[0]:
        axis.axis("off")
    if not pictures:
        axes[0, 0].text(0, 0.5, "no image", fontsize=12)
    figure.suptitle(printable_lines(title), fontsize=10, parse_math=False)
    return figure


def _draw_image(
    figure: Figure, panels: Sequence[Axes], number: int, picture: np.ndarray, attention_HTV: np.ndarray, regions_R8: np.ndarray
) -> None:
    """The image, all heads and each head, with one scale and its colour bar."""
    panels[0].imshow(picture)
    panels[0].axis("off")
    set_title(panels[0], "image")
    image_V = np.repeat(regions_R8[:, 0].astype(int), tokens_of(regions_R8))
    mass_H = attention_HTV[:, :, image_V == number].sum(axis=2).mean(axis=1)
    maps = [image_heat(attention_HTV, regions_R8, number)]
    maps += [image_heat(attention_HTV[head : head + 1], regions_R8, number) for head in range(len(panels) - 2)]
    titles = [f"all {len(mass_H)} heads\n{mass_H.mean():.1%} of attention"]
    titles += [f"head {head}\n{mass_H[head]:.1%}" for head in range(len(panels) - 2)]
    most = max((float(values.max()) for heat in maps for values, _ in heat), default=0.0) or 1.0
    for axes, heat, title in zip(panels[1:], maps, titles, strict=True):
        overlay(axes, picture, heat, title, most)
    bar = figure.colorbar(ScalarMappable(Normalize(0, most), "magma"), ax=list(panels), shrink=0.8, pad=0.01)
    bar.set_label("attention to a vision token", fontsize=7)
    bar.ax.tick_params(labelsize=6)


def _draw_rows(
    figure: Figure, axes: Axes, attention_HTV: np.ndarray, rows: int, regions_R8: np.ndarray, pieces: Sequence[str]
) -> None:
    """Text rows over vision tokens, averaged over heads; lines between images."""
    shown = attention_HTV.shape[1]
    drawn = axes.imshow(attention_HTV.mean(axis=0), cmap="magma", aspect="auto", interpolation="nearest", vmin=0)
    labels = [printable(piece) for piece in pieces[:shown]] or [str(row) for row in range(shown)]
    axes.set_yticks(range(shown), [label if len(label) <= 18 else f"{label[:17]}…" for label in labels], fontsize=6)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    axes.tick_params(axis="x", labelsize=6)
    axes.set_xlabel("vision token", fontsize=7)
    tokens = tokens_of(regions_R8)
    for end in np.cumsum(tokens)[:-1][np.diff(regions_R8[:, 0]) != 0]:
        axes.axvline(end - 0.5, color="white", linewidth=1)
    part = "" if shown == rows else f", the first {shown} of {rows}"
    set_title(axes, f"text tokens after the image, from top to bottom{part}; mean of all heads")
    bar = figure.colorbar(drawn, ax=axes, pad=0.01)
    bar.ax.tick_params(labelsize=6)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure to a file of the format that its name ends in, and free it.

    Raises:
        ConfigError: matplotlib cannot write this format.
    """
    refused = f"the figure cannot be written to {path}; give a name that ends in .png"
    with wrap_errors(ConfigError, refused, ValueError), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # such a character is drawn as a box
        figure.savefig(path, dpi=140, bbox_inches="tight")
    plt.close(figure)
