"""Pictures: attention drawn over an image, and the few charts of the report. Drawn without a display."""

from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["Figure", "attention_figure", "image_heat", "overlay", "plt", "save_figure"]


def overlay(axes: Axes, picture: np.ndarray, heat: np.ndarray, title: str) -> None:
    """Draw a heat map ``[rows, columns]`` over a picture ``[h, w, 3]``; white is the most attended token."""
    height, width = picture.shape[:2]
    grey = picture.mean(axis=2)
    axes.imshow(grey, cmap="gray", vmin=0, vmax=1.6, extent=(0, width, height, 0))
    axes.imshow(heat, cmap="magma", alpha=0.55, extent=(0, width, height, 0), interpolation="nearest", vmin=0)
    axes.set_title(title, fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])


def image_heat(attention_HTV: np.ndarray, image: int, tokens: int, grid: tuple[int, int]) -> np.ndarray:
    """Attention on one image's tokens, averaged over heads and text rows, as a grid ``[rows, columns]``."""
    heat: np.ndarray = attention_HTV[:, :, image * tokens : (image + 1) * tokens].mean(axis=(0, 1)).reshape(grid)
    return heat


def attention_figure(
    pictures: list[np.ndarray], attention_HTV: np.ndarray, grid: tuple[int, int], title: str, heads: int = 4
) -> Figure:
    """Each image of a sample: itself, the mean attention, and the heads that attend to it most."""
    tokens = grid[0] * grid[1]
    shown = min(heads, attention_HTV.shape[0] if attention_HTV.shape[0] > 1 else 0)
    figure, axes = plt.subplots(
        max(len(pictures), 1), 2 + shown, figsize=(2.1 * (2 + shown), 2.5 * max(len(pictures), 1) + 0.4), squeeze=False
    )
    for row, picture in enumerate(pictures):
        axes[row, 0].imshow(picture)
        axes[row, 0].set_title("image", fontsize=8)
        axes[row, 0].axis("off")
        mass_H = attention_HTV[:, :, row * tokens : (row + 1) * tokens].sum(axis=2).mean(axis=1)
        heat = image_heat(attention_HTV, row, tokens, grid)
        overlay(axes[row, 1], picture, heat, f"all heads\n{mass_H.mean():.1%} of attention")
        for column, head in enumerate(np.argsort(-mass_H)[:shown], start=2):
            heat = image_heat(attention_HTV[head : head + 1], row, tokens, grid)
            overlay(axes[row, column], picture, heat, f"head {head}\n{mass_H[head]:.1%}")
    if not pictures:
        for axis in axes[0]:
            axis.axis("off")
        axes[0, 0].text(0, 0.5, "no image", fontsize=12)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure and forget it."""
    figure.savefig(path, dpi=140, bbox_inches="tight")
    plt.close(figure)
