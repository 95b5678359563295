"""Where the text of several models looks, on the same images: one scale for all panels, shown by one bar of colours.

Shapes: H heads, T text rows, V vision columns, R regions of 8 numbers each (see :mod:`alignkd.inputs.regions`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from alignkd.inputs.regions import tokens_of
from alignkd.pipeline.figures.attention import image_heat, overlay, plt
from alignkd.pipeline.report.page import Html, Text, captioned, embed, heading, joined, panels, paragraph, small
from alignkd.pipeline.report.words import percent, short

_MOST_HEADS = 16
_INCHES = 1.7


@dataclass(frozen=True)
class Seen:
    """The first image of a sample ``[h, w, 3]`` in 0..1, and one model's attention from the text to its vision tokens."""

    picture: np.ndarray
    attention_HTV: np.ndarray
    regions_R8: np.ndarray

    @property
    def share(self) -> float:
        """The share of all attention of the text that falls on the image, averaged over heads and text rows."""
        return float(self.by_head.mean())

    @property
    def by_head(self) -> np.ndarray:
        """The same for each head, ``[H]``."""
        image_V = np.repeat(self.regions_R8[:, 0].astype(int), tokens_of(self.regions_R8))
        found: np.ndarray = self.attention_HTV[:, :, image_V == 0].sum(axis=2).mean(axis=1)
        return found

    def most(self, heads: slice = slice(None)) -> float:
        """The largest value of the map that is drawn of these heads."""
        maps = image_heat(self.attention_HTV[heads], self.regions_R8, 0)
        return max((float(values.max()) for values, _ in maps), default=0.0)


Column = Sequence[Seen | str]
"""One model's attention on each sample; why not, where there is none."""


def attention_grid(groups: Iterable[tuple[Sequence[str], Mapping[str, Column]]]) -> Html:
    """All samples, with a panel for each model. A group: what each sample asks, and a column for each model by its name."""
    groups = [(list(asked), dict(columns)) for asked, columns in groups]
    all_seen = [seen for _, columns in groups for column in columns.values() for seen in column if isinstance(seen, Seen)]
    if not all_seen:
        return joined(_reasons(groups))
    most = max((seen.most() for seen in all_seen), default=0.0) or 1.0
    rows = [
        _row(text, {name: column[i] for name, column in columns.items()}, most)
        for asked, columns in groups
        for i, text in enumerate(asked)
    ]
    return joined([_bar(most, "attention to a vision token, in all panels with an image below"), *rows])


def head_grid(asked: str, columns: Mapping[str, Seen]) -> Html:
    """The heads of each model in their order, on one sample; one scale for all of them."""
    shown = {name: min(len(seen.attention_HTV), _MOST_HEADS) for name, seen in columns.items()}
    most = max((seen.most(slice(h, h + 1)) for name, seen in columns.items() for h in range(shown[name])), default=0.0) or 1.0
    parts: list[Text] = [paragraph(short(asked)), _bar(most, "attention to a vision token, in all panels of one head")]
    for name, seen in columns.items():
        heads, by_head = len(seen.attention_HTV), seen.by_head
        of = f", the first {shown[name]}" if heads > shown[name] else ""
        parts.append(heading(joined([name, f": {heads} heads{of}"]), 3))
        tiles = [
            captioned(
                _panel(seen, most, f"{name}, head {head}", slice(head, head + 1)), f"head {head}: {percent(by_head[head])}"
            )
            for head in range(shown[name])
        ]
        parts.append(panels(tiles, "tiles"))
    return joined(parts)


def _row(asked: str, seen: Mapping[str, Seen | str], most: float) -> Html:
    tiles = list[Html]()
    if first := next((one for one in seen.values() if isinstance(one, Seen)), None):
        tiles.append(captioned(_picture(first.picture), "the image"))
    for name, one in seen.items():
        if isinstance(one, Seen):
            tiles.append(captioned(_panel(one, most, name), f"{name}: {percent(one.share)} on the image"))
        else:
            tiles.append(small(f"{name}: {short(one)}"))
    return joined([paragraph(short(asked)), panels(tiles, "tiles")])


def _reasons(groups: Sequence[tuple[Sequence[str], Mapping[str, Column]]]) -> Iterator[Html]:
    found = dict.fromkeys(
        f"{name}: {short(one)}"
        for _, columns in groups
        for name, column in columns.items()
        for one in column
        if isinstance(one, str)
    )
    for reason in found:
        yield paragraph(reason, "missing")


def _panel(seen: Seen, most: float, name: str, heads: slice = slice(None)) -> Html:
    figure, axes = plt.subplots(figsize=(_INCHES, _INCHES))
    axes.set_facecolor("0.35")  # under the borders that some families pad an image with, where no picture is
    overlay(axes, seen.picture, image_heat(seen.attention_HTV[heads], seen.regions_R8, 0), "", most)
    return embed(figure, f"attention of {name}, at most {seen.most(heads):.3g} to a vision token")


def _picture(picture: np.ndarray) -> Html:
    figure, axes = plt.subplots(figsize=(_INCHES, _INCHES))
    axes.imshow(picture)
    axes.axis("off")
    return embed(figure, "the image")


def _bar(most: float, label: str) -> Html:
    figure, axes = plt.subplots(figsize=(4.2, 0.28))
    bar = figure.colorbar(ScalarMappable(Normalize(0, most), "magma"), cax=axes, orientation="horizontal")
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=9)
    return embed(figure, f"{label}: from 0 (black) to {most:.3g} (white)")
