"""Attention drawn over an image; matplotlib set up to draw without a display.

Shapes: H heads, T text rows, V vision columns, R regions of 8 numbers each (see :mod:`alignkd.inputs.regions`).
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alignkd.errors import ConfigError, wrap_errors
from alignkd.inputs.regions import tokens_of
from alignkd.pipeline.runtime.printable import printable_lines

__all__ = ["Figure", "attention_figure", "image_heat", "overlay", "plt", "save_figure", "set_title"]


Patch = tuple[np.ndarray, tuple[float, float, float, float]]
"""A heat map ``[rows, columns]`` and its box (top, left, bottom, right) in fractions of the picture."""


def overlay(axes: Axes, picture: np.ndarray, heat: Sequence[Patch], title: str) -> None:
    """Draw heat maps over a picture ``[h, w, 3]``, one after the other; white is the most attended token of each."""
    height, width = picture.shape[:2]
    axes.imshow(picture.mean(axis=2), cmap="gray", vmin=0, vmax=1.6, extent=(0, width, height, 0))
    for values, (top, left, bottom, right) in heat:
        extent = (left * width, right * width, bottom * height, top * height)
        axes.imshow(values, cmap="magma", alpha=0.55, extent=extent, interpolation="nearest", vmin=0)
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
    pictures: list[np.ndarray], attention_HTV: np.ndarray, regions_R8: np.ndarray, title: str, heads: int = 4
) -> Figure:
    """One row for each image of a sample: the image, the mean attention, and the heads that attend to it most."""
    shown = min(heads, attention_HTV.shape[0] if attention_HTV.shape[0] > 1 else 0)
    figure, axes = plt.subplots(
        max(len(pictures), 1), 2 + shown, figsize=(2.1 * (2 + shown), 2.5 * max(len(pictures), 1) + 0.4), squeeze=False
    )
    image_V = np.repeat(regions_R8[:, 0].astype(int), tokens_of(regions_R8))
    for row, picture in enumerate(pictures):
        axes[row, 0].imshow(picture)
        set_title(axes[row, 0], "image")
        axes[row, 0].axis("off")
        mass_H = attention_HTV[:, :, image_V == row].sum(axis=2).mean(axis=1)
        heat = image_heat(attention_HTV, regions_R8, row)
        overlay(axes[row, 1], picture, heat, f"all heads\n{mass_H.mean():.1%} of attention")
        for column, head in enumerate(np.argsort(-mass_H)[:shown], start=2):
            heat = image_heat(attention_HTV[head : head + 1], regions_R8, row)
            overlay(axes[row, column], picture, heat, f"head {head}\n{mass_H[head]:.1%}")
    if not pictures:
        for axis in axes[0]:
            axis.axis("off")
        axes[0, 0].text(0, 0.5, "no image", fontsize=12)
    figure.suptitle(printable_lines(title), fontsize=10, parse_math=False)
    figure.tight_layout()
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure to a file of the format that its name ends in, and free it.

    Raises:
        ConfigError: matplotlib cannot write this format.
    """
    with wrap_errors(ConfigError, f"the figure cannot be written to {path}; give a name that ends in .png", ValueError):
        figure.savefig(path, dpi=140, bbox_inches="tight")
    plt.close(figure)
