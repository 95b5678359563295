"""Charts of the demo's page: accuracy of each model, and the loss of each run term by term."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alignkd.losses.recipes import TERMS
from alignkd.pipeline.figures.attention import Figure, plt

_COLOURS = {"sft": "#8c8c8c", "align-kd": "#d1495b", "teacher": "#2e4057", "floor": "#c9c9c9"}


def accuracy_chart(figures: dict[str, Any]) -> Figure:
    """A bar with its interval for each model, and the question-only floor as a line."""
    names = sorted(figures["accuracy"], key=lambda name: name == "teacher")
    values = np.array([figures["accuracy"][name]["accuracy"] for name in names]) * 100
    ends = np.array([figures["accuracy"][name]["interval_95"] for name in names]).T * 100
    figure, axes = plt.subplots(figsize=(7, 2.6))
    colours = [_COLOURS.get(name.removeprefix("student "), "#66a182") for name in names]
    axes.barh(names, values, xerr=np.abs(ends - values), color=colours, height=0.6, capsize=3)
    axes.axvline(figures["question_only_floor"] * 100, color="#555", linestyle=":", label="question alone")
    for row, (value, end) in enumerate(zip(values, ends[1], strict=True)):
        axes.text(end + 0.6, row, f"{value:.1f}", va="center", fontsize=9)
    axes.set_xlim(50, 104)
    axes.set_xlabel("accuracy, %")
    axes.legend(loc="lower right", fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def loss_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """One panel for each term, with one curve for each run. ``runs``: the log lines of each run, by its recipe."""
    shown = [term for term in TERMS if any(term in lines[0] for lines in runs.values())]
    figure, axes = plt.subplots(1, len(shown), figsize=(2.6 * len(shown), 2.5), squeeze=False)
    for axis, term in zip(axes[0], shown, strict=True):
        for arm, lines in runs.items():
            if term in lines[0]:
                steps, values = [line["step"] for line in lines], [line[term] for line in lines]
                axis.plot(steps, values, color=_COLOURS.get(arm, "#66a182"), label=arm, linewidth=1.3)
        axis.set_title(term.replace("_", " "), fontsize=9)
        axis.set_yscale("log")
        axis.tick_params(which="both", labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(fontsize=8, frameon=False)
    figure.supxlabel("step", fontsize=8)
    figure.tight_layout()
    return figure
