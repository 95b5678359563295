"""Charts of a page: figures over the steps of runs, shares of a loss, and bars. An axis that does not start at zero says so."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from alignkd.pipeline.figures.attention import Figure, plt, set_title
from alignkd.pipeline.report.page import Html, embed, shown
from alignkd.pipeline.runtime.redact import redacted_text

COLOURS = ("#0072b2", "#d55e00", "#00805e", "#b0478a", "#5b5b5b", "#8a6d00", "#3f8fc4", "#000000")
"""Told apart by readers who see few colours; each has a contrast of 3 to 1 or more against white."""
_DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (2, 1.5)), (0, (6, 2, 1, 2)))
_BORDERS = ("solid", "dashed", "dotted", "double")
_SIZE = (4.4, 2.9)
_MARKED = 30
"""Curves of so few points show each of them."""
_SMOOTHED = 250
"""Curves of more points than this are drawn faint, with their moving mean over them."""
_LOG_FROM = 20.0
"""Positive values whose largest is so many times the smallest get a logarithmic axis."""
_CLOSE = 0.35
"""An axis is cut where the values spread over less than this share of the largest."""


@dataclass(frozen=True)
class Curve:
    """Values over steps. ``place``: of its run among those of the page, which decides its colour."""

    label: str
    steps: Sequence[int]
    values: Sequence[float]
    place: int = 0


@dataclass(frozen=True)
class Panel:
    """A chart of one figure. ``unit``: below the title; ``zero``: whether its axis always starts at zero."""

    title: str
    curves: Sequence[Curve]
    unit: str = ""
    zero: bool = False
    marks: Mapping[str, float] = field(default_factory=dict)
    """Horizontal lines by their label."""


def legend(labels: Sequence[str], *, lines: bool = True) -> Html:
    """What the colours of a page's curves, or without ``lines`` of its areas, mean; nothing where there is one."""
    if len(labels) < 2:
        return Html()
    kinds = [_BORDERS[_dash(place)] if lines else "solid;border-top-width:10px" for place in range(len(labels))]
    styles = [f"border-top-color:{_colour(place)};border-top-style:{kind}" for place, kind in enumerate(kinds)]
    items = [f"<li><i style='{style}'></i>{shown(label)}</li>" for style, label in zip(styles, labels, strict=True)]
    return Html(f"<ul class='legend'>{''.join(items)}</ul>")


def curves(panel: Panel) -> Html:
    """One chart as a picture; its description says where each curve starts and ends."""
    figure, axes = plt.subplots(figsize=_SIZE)
    for curve in panel.curves:
        _draw(axes, curve)
    note = _scale(axes, panel)
    for label, value in panel.marks.items():
        axes.axhline(value, color="#555555", linestyle=":", linewidth=1)
        axes.annotate(label, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    words = ", ".join(word for word in (panel.unit, note) if word)
    set_title(axes, redacted_text(panel.title) + (f"\n{words}" if words else ""), size=10)
    axes.set_xlabel("step", fontsize=9)
    _plain(axes)
    figure.tight_layout()
    return embed(figure, f"{panel.title}: {'; '.join(map(_described, panel.curves))}")


def shares(label: str, steps: Sequence[int], parts: Mapping[str, Sequence[float]], places: Mapping[str, int]) -> Html:
    """Shares of a whole over the steps, one above the other from 0 to 100 %.

    ``parts``: values from 0 to 1 by name; ``places``: of each name in the legend, which decides its colour.
    """
    figure, axes = plt.subplots(figsize=_SIZE)
    values = np.nan_to_num(np.array([parts[name] for name in parts], dtype=float)) * 100
    wide = list(steps) if len(steps) > 1 else [*steps, *(step + 1 for step in steps)]
    if len(steps) == 1:
        values = np.repeat(values, 2, axis=1)
    axes.stackplot(wide, values, colors=[_colour(places[name]) for name in parts], edgecolor="white", linewidth=0.4)
    axes.set_ylim(0, 100)
    axes.set_xlim(wide[0], wide[-1])
    axes.set_xlabel("step", fontsize=9)
    set_title(axes, f"{label}\n% of the loss", size=10)
    _plain(axes)
    figure.tight_layout()
    last = ", ".join(f"{name} {row[-1]:.1f} %" for name, row in zip(parts, values.tolist(), strict=True))
    return embed(figure, f"shares of the loss, {label}; at the end {last}")


def interval_bars(rows: Mapping[str, tuple[float, float, float]], mark: tuple[str, float] | None = None) -> Figure:
    """A bar with its interval for each row, in per cent from zero; ``rows``: value, low and high end; ``mark``: a line."""
    figure, axes = plt.subplots(figsize=(7, 0.42 * len(rows) + 1.3))
    values = np.array([value for value, _, _ in rows.values()]) * 100
    ends = np.array([end[1:] for end in rows.values()]).T * 100
    places = np.arange(len(rows))
    bars = [_colour(place) for place in range(len(rows))]
    axes.barh(places, values, xerr=np.abs(ends - values), color=bars, height=0.6, capsize=3)
    axes.set_yticks(places, list(rows), fontsize=10, parse_math=False)
    axes.invert_yaxis()
    for place, (value, end) in enumerate(zip(values, ends[1], strict=True)):
        axes.text(end + 1, place, f"{value:.1f}", va="center", fontsize=10)
    if mark is not None:
        axes.axvline(mark[1] * 100, color="#333333", linestyle=":", label=mark[0])
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), fontsize=9, frameon=False)
    axes.set_xlim(0, 108)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("accuracy, %", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _dash(place: int) -> int:
    return place % len(_DASHES)


def _draw(axes: Axes, curve: Curve) -> None:
    about: dict[str, Any] = {"color": _colour(curve.place), "linestyle": _DASHES[_dash(curve.place)], "linewidth": 1.5}
    if len(curve.values) <= _SMOOTHED:
        axes.plot(curve.steps, curve.values, marker="o" if len(curve.values) <= _MARKED else None, markersize=3.2, **about)
        return
    axes.plot(curve.steps, curve.values, color=about["color"], linewidth=0.6, alpha=0.35)
    axes.plot(curve.steps, _moving_mean(curve.values), **about)


def _moving_mean(values: Sequence[float]) -> np.ndarray:
    """Of each value and those before it, over a fiftieth of the curve; values that are NaN count nothing."""
    width = max(len(values) // 50, 1)
    given = np.asarray(values, dtype=float)
    known = np.isfinite(given)
    total, count = (np.cumsum(part) for part in (np.where(known, given, 0.0), known.astype(float)))
    before = np.r_[np.zeros(width), total[:-width]], np.r_[np.zeros(width), count[:-width]]
    with np.errstate(invalid="ignore", divide="ignore"):
        mean: np.ndarray = (total - before[0]) / (count - before[1])
    return mean


def _scale(axes: Axes, panel: Panel) -> str:
    """Set the vertical axis; what to say of it where it does not start at zero."""
    values = [value for curve in panel.curves for value in curve.values if math.isfinite(value)]
    values += list(panel.marks.values())
    if not values:
        return "no finite value"
    low, high = min(values), max(values)
    if not panel.zero and low > 0 and high / low > _LOG_FROM:
        axes.set_yscale("log")
        wide = high / low > 1000
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 3.0), numticks=8))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        return "logarithmic axis"
    if low >= 0 and (panel.zero or high - low > _CLOSE * high or high == 0):
        axes.set_ylim(0, (high or 1.0) * 1.06)
        return ""
    room = (high - low) * 0.08 or abs(high) * 0.05
    axes.set_ylim(low - room, high + room)
    bottom, top = axes.get_ylim()
    return "" if bottom <= 0 <= top else "axis does not start at 0"


def _plain(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.tick_params(which="both", labelsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)


def _described(curve: Curve) -> str:
    known = [(step, value) for step, value in zip(curve.steps, curve.values, strict=True) if math.isfinite(value)]
    if not known:
        return f"{curve.label} has no finite value"
    (first, start), (last, end) = known[0], known[-1]
    return f"{curve.label} {start:.4g} at step {first}, {end:.4g} at step {last}"
