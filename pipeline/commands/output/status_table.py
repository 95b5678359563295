"""``alignkd cache status`` for people: tables of at most 80 columns."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from alignkd.cache_store.protocol.worker_reports import AT_WORK
from alignkd.pipeline.cache_admin.sight import SIGHT, sight_words
from alignkd.pipeline.commands.output.printing import size_words
from alignkd.pipeline.commands.output.tables import add_row, figures_table, print_width
from alignkd.pipeline.config.cache_layout import ADVANTAGE, attention_layer
from alignkd.pipeline.runtime.printable import printable, printable_lines

_MOST_WORKERS = 12
_MOST_REASONS = 8


def print_status(figures: Mapping[str, Any]) -> None:
    """Print the figures of :mod:`alignkd.pipeline.cache_admin.status` on standard output."""
    print_width(status_table(figures))


def status_table(figures: Mapping[str, Any]) -> Group:
    """The figures as text and tables."""
    parts: list[RenderableType] = [Text(printable(headline(figures)))]
    if "shards" in figures:
        parts += ["", _progress(figures), Text(rate_words(figures))]
        if figures.get(SIGHT) is not None:
            parts += [Text(sight_words(figures[SIGHT]))]
        if figures["shards_missing"]:
            parts += [Text(printable_lines(_missing_words(figures)))]
        if figures["shards_to_retry"]:
            parts += [Text(_retry_words(figures["shards_to_retry"]))]
        if figures["samples_rejected"]:
            parts += ["", _rejected(figures)]
    if figures["workers"]:
        parts += ["", _workers(figures["workers"])]
    if "shards" in figures and figures["samples_done"]:
        parts += ["", _bytes(figures)]
    return Group(*parts)


def headline(figures: Mapping[str, Any]) -> str:
    """The cache, its format, and what happens with it."""
    calibrating = any(worker["state"] == "calibrating" for worker in figures["workers"])
    if "shards" not in figures:
        doing = (
            "its first worker is calibrating" if calibrating else "not started: its first worker ended before the first shard"
        )
        return f"{figures['cache']}: {doing}"
    if figures["complete"]:
        doing = "complete"
    else:
        at_work = figures["workers_at_work"]
        doing = f"incomplete, {at_work} {_plural('worker', at_work)} at work"
    return f"{figures['cache']} ({figures['format']}): {doing}"


def rate_words(figures: Mapping[str, Any]) -> str:
    """The rate of the last minutes and the time left; why there is none, where there is none."""
    if figures["complete"]:
        return f"{figures['samples_per_second']:,.4g} samples a second and worker"
    if not figures["workers_at_work"] and any(worker["state"] != "unknown" for worker in figures["workers"]):
        return "no worker is at work: run the same alignkd cache-teacher again to continue"
    if figures["recent_samples_per_second"] is None:
        return "rate and time left: not known before two shards are committed"
    rate = f"{figures['recent_samples_per_second']:,.4g} samples a second in the last minutes of work"
    return f"{rate}, {duration(figures['seconds_left'])} left at this rate"


def duration(seconds: float) -> str:
    """A time span in its two largest units: ``3 h 20 min``."""
    whole = round(seconds)
    for unit, length, smaller, part in (("d", 86_400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= length:
            return f"{whole // length} {unit} {whole % length // part} {smaller}"
    return f"{whole} s"


def _progress(figures: Mapping[str, Any]) -> Table:
    table = figures_table(("", "done", "left", "rejected", "planned"))
    done, rejected, planned = figures["samples_done"], figures["samples_rejected"], figures["samples"]
    add_row(table, "samples", f"{done:,}", f"{planned - done - rejected:,}", f"{rejected:,}", f"{planned:,}")
    add_row(
        table,
        "shards",
        f"{figures['shards_done']:,}",
        f"{figures['shards'] - figures['shards_done']:,}",
        "",
        f"{figures['shards']:,}",
    )
    return table


def _missing_words(figures: Mapping[str, Any]) -> str:
    missing = figures["shards_missing"]
    named = ", ".join(f"{number:06d}" for number in missing[:4]) + (", ..." if len(missing) > 4 else "")
    return (
        f"{len(missing)} committed {_plural('shard', len(missing))} missing ({named}): the file was deleted.\n"
        f"To make it again, run cache-teacher after: alignkd cache repair {shlex.quote(figures['cache'])}"
    )


def _retry_words(shards: Sequence[int]) -> str:
    return f"{len(shards)} {_plural('shard', len(shards))} to be made again, for rejected samples of theirs: run cache-teacher"


def _rejected(figures: Mapping[str, Any]) -> Table:
    table = figures_table(("rejected because", "samples", "for example"), wide=2)
    for kind, count in list(figures["rejected_by_reason"].items())[:_MOST_REASONS]:
        first = next(sample for sample in figures["rejected"] if sample["kind"] == kind)
        add_row(table, kind, f"{count:,}", f"{first['id'] or first['key']}: {first['reason']}")
    return table


def _workers(workers: Sequence[Mapping[str, Any]]) -> Table:
    table = figures_table(("worker", "host", "state", "last commit", "samples", "a second"), texts=("host", "state"))
    for worker in workers[:_MOST_WORKERS]:
        last, rate = worker["seconds_since_commit"], worker["samples_per_second"]
        state = "alive, " + worker["state"] if worker["state"] in AT_WORK else worker["state"]
        ago = "none yet" if last is None else f"{duration(last)} ago"
        add_row(
            table,
            worker["worker"],
            worker["host"],
            state,
            ago,
            f"{worker['samples']:,}",
            "" if rate is None else f"{rate:,.4g}",
        )
    if len(workers) > _MOST_WORKERS:
        add_row(table, "...", f"{len(workers) - _MOST_WORKERS} more: --json", "", "", "", "")
    return table


def _bytes(figures: Mapping[str, Any]) -> Table:
    naive, stored = figures["dense_bytes_by_field"], dict[str, int]()
    for name, size in figures["bytes_by_field"].items():
        stored[_target(name)] = stored.get(_target(name), 0) + size
    table = figures_table(("bytes", "stored", "a sample", "uncompressed", "ratio"))
    for target, size in stored.items():
        _size_row(table, target, size, naive.get(target.replace(" ", "_"), 0), figures["samples_done"])
    if figures["tensor_bytes"]:
        _size_row(table, "once a cache", figures["tensor_bytes"], 0, 0)
    _size_row(table, "all", figures["bytes"], sum(naive.values()), figures["samples_done"])
    return table


def _target(field: str) -> str:
    """What a field of a row belongs to, in the words of ``--targets``."""
    if field in ("input_ids", "labels", "spans", "regions"):
        return "token ids"
    if field == ADVANTAGE:
        return field
    return "attention" if attention_layer(field) is not None else "vision tokens" if field == "vision_tokens" else "logits"


def _size_row(table: Table, name: str, size: int, naive: int, samples: int) -> None:
    each = size_words(size / samples) if samples else ""
    add_row(
        table,
        name,
        size_words(size),
        each,
        size_words(naive) if naive else "",
        f"1 : {naive / size:,.1f}" if naive and size else "",
    )


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else noun + "s"
