"""``alignkd check`` for people: tables of at most 80 columns."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from alignkd.pipeline.commands.output.tables import add_row, figures_table, print_width
from alignkd.pipeline.runtime.printable import printable_lines

_MOST_REASONS = 12
_MOST_SOURCES = 20
_MOST_NUMBERS = 8
_BAR = 30


def print_check(figures: Mapping[str, Any]) -> None:
    """Print the figures of :mod:`alignkd.pipeline.check.report` on standard output."""
    print_width(check_tables(figures))


def check_tables(figures: Mapping[str, Any]) -> Group:
    """The figures as text and tables; the last line says how many samples can be used."""
    parts: list[RenderableType] = []
    if len(figures["sources"]) > 1:
        parts += [_sources(figures["sources"]), ""]
    parts += [_samples(figures), ""]
    if figures["lengths"]["histogram"]:
        parts += [_lengths(figures["lengths"]), ""]
    if figures["image_files"] is not None and figures["image_files"]["referenced"]:
        parts += [_images(figures["image_files"]), ""]
    notes = _notes(figures)
    if notes.row_count:
        parts += [notes, ""]
    if figures["reasons"]:
        parts += [_reasons(figures["reasons"]), ""]
    if figures["model"] is not None and (said := _about_model(figures["model"])):
        parts += [Text(said), ""]
    return Group(*parts, Text(printable_lines(summary(figures))))


def summary(figures: Mapping[str, Any]) -> str:
    """What was found, in a line."""
    usable, samples = figures["usable"], figures["samples"]
    share = f" ({100 * usable / samples:.1f}%)" if 0 < usable < samples else ""
    model = "" if figures["model"] is None else f" by {figures['model']['folder']}"
    return f"{usable:,} of {samples:,} samples{share} can be used{model}; {figures['rejected']:,} cannot"


def _samples(figures: Mapping[str, Any]) -> Table:
    table, all_of_them = figures_table(("samples", "count", "share")), figures["samples"]
    rows = [
        ("all", all_of_them),
        ("can be used", figures["usable"]),
        ("text only", figures["text_only"]),
        ("several images", figures["several_images"]),
        ("with a system turn", figures["system_turns"]),
    ]
    if figures["cut"] is not None:
        rows.append(("cut at --max-length", figures["cut"]["samples"]))
    rows += [(f"answers by {name}", count) for name, count in figures["provenances"].items() if name != "data"]
    turns = figures["turns_per_sample"]
    shown = sorted(turns.items(), key=lambda one: -one[1])[:_MOST_NUMBERS]
    rows += [(f"{number} turns", count) for number, count in sorted(shown, key=lambda one: int(one[0]))]
    if others := sum(turns.values()) - sum(count for _, count in shown):
        rows.append(("other numbers of turns", others))
    for name, count in rows:
        add_row(table, name, f"{count:,}", f"{100 * count / max(all_of_them, 1):.1f}%")
    return table


def _sources(sources: Sequence[Mapping[str, Any]]) -> Table:
    table = figures_table(("source", "samples", "usable", "text only", "several images", "median length"), wide=0)
    for source in sources[:_MOST_SOURCES]:
        median = source["lengths"]["median"]
        counts = (source["samples"], source["usable"], source["text_only"], source["several_images"])
        add_row(table, source["name"], *(f"{count:,}" for count in counts), "" if median is None else f"{median:,}")
    if len(sources) > _MOST_SOURCES:
        add_row(table, f"{len(sources) - _MOST_SOURCES} more: --json", "", "", "", "", "")
    return table


def _lengths(lengths: Mapping[str, Any]) -> Table:
    table = figures_table((f"{lengths['unit']} a sample", "samples", ""), texts=("",))
    most = max(one["samples"] for one in lengths["histogram"])
    for one in lengths["histogram"]:
        bar = "#" * -(-one["samples"] * _BAR // most)
        add_row(table, f"{one['from']:,} to {one['to']:,}" if one["to"] else "0", f"{one['samples']:,}", bar)
    figures = ", ".join(f"{name} {lengths[name]:,}" for name in ("least", "median", "mean", "p95", "most"))
    table.caption, table.caption_justify = Text(figures), "left"
    return table


def _images(images: Mapping[str, Any]) -> Table:
    table = figures_table(("image files", "count", "for example"), wide=2)
    add_row(table, "named by samples", f"{images['referenced']:,}", "")
    add_row(table, "missing", f"{images['missing']:,}", "")
    add_row(table, "unreadable", f"{images['unreadable']:,}", "")
    for name, count in images["formats"].items():
        add_row(table, name, f"{count:,}", "")
    for one in images["longer_sides"]:
        ends = f"{one['from']:,} to {one['to']:,}" if one["to"] else f"{one['from']:,} and more"
        add_row(table, f"longer side {ends}", f"{one['images']:,}", "")
    for one in images["doubtful"]:
        add_row(table, one["reason"], f"{one['samples']:,}", one["first"][0]["id"] if one["first"] else "")
    return table


def _notes(figures: Mapping[str, Any]) -> Table:
    table = figures_table(("worth a look", "samples", "for example"), wide=2)
    duplicates = figures["duplicates"]
    same, content = duplicates["same_sample"], duplicates["same_content"]
    if same["samples"]:
        add_row(table, "there more than once", f"{same['samples']:,}", ", ".join(same["first"]))
    if content["samples"]:
        pairs = ", ".join(f"{one['id']} as {one['as']}" for one in content["first"])
        add_row(table, "the same under another id", f"{content['samples']:,}", pairs)
    for one in figures["read_otherwise"][:_MOST_REASONS]:
        add_row(table, one["reason"], f"{one['samples']:,}", ", ".join(named["id"] for named in one["first"]))
    if figures["cut"] is not None and figures["cut"]["samples"]:
        named = ", ".join(one["id"] for one in figures["cut"]["first"])
        add_row(table, "cut at --max-length", f"{figures['cut']['samples']:,}", named)
    table.columns[0].no_wrap = False
    return table


def _reasons(reasons: Sequence[Mapping[str, Any]]) -> Table:
    table = figures_table(("cannot be used because", "samples", "first"), wide=2)
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"
    table.columns[2].min_width = 16
    for one in reasons[:_MOST_REASONS]:
        words = one["first"][0]["reason"] if one["first"] else one["reason"]
        add_row(table, words, f"{one['samples']:,}", ", ".join(named["id"] for named in one["first"]))
    if len(reasons) > _MOST_REASONS:
        add_row(table, f"{len(reasons) - _MOST_REASONS} more reasons: --json", "", "")
    return table


def _about_model(model: Mapping[str, Any]) -> str:
    said = []
    if model["loaded_weights"]:
        said.append("The weights were loaded: this family cannot be described without them.")
    if model["assumes_image_size"]:
        said.append("Images were not read: lengths are those of images of 336 x 336 pixels.")
    return " ".join(said)
