"""What the cache of a run takes, field by field, against the same targets uncompressed in 16 bits. Needs no torch."""

from collections.abc import Mapping, Sequence
from typing import Any

from alignkd.errors import AlignkdError
from alignkd.pipeline.cache_admin.status import figures_at
from alignkd.pipeline.config.cache_layout import attention_layer
from alignkd.pipeline.report.page import Html, Text, joined, missing, section, small, table
from alignkd.pipeline.report.runs.run import Run
from alignkd.pipeline.report.words import adding_up, short

_IDS = ("input_ids", "labels", "spans", "regions")
_NAMES = {"attention": "attention", "vision_tokens": "vision tokens", "logits": "logits", "ids": "token ids, labels, regions"}


def cache_section(runs: Sequence[Run], url: str | None = None) -> tuple[Html, dict[str, Any]]:
    """A table for each cache that the runs learned from. ``url``: where it is, instead of where the runs had it."""
    owners = dict[str, list[str]]()
    notes = list[Text]()
    for run in runs:
        before = f"{run.name}: " if len(runs) > 1 else ""
        learned_from = (url,) if url else run.texts("cache")
        for found in learned_from:
            owners.setdefault(found, []).append(run.name)
        if not learned_from:
            notes.append(missing(f"{before}no cache: {_without(run)}"))
    figures, parts = dict[str, Any](), list[Text]()
    for found, names in owners.items():
        before = f"{', '.join(names)}: " if len(runs) > 1 else ""
        try:
            figures[found] = figures_at(found)
            parts.append(_one(before, figures[found]))
        except (AlignkdError, OSError) as error:
            parts.append(missing(f"{before}the cache at {found} cannot be read here: {short(error)}; give --cache where it is"))
    return section("The cache", *parts, *notes), figures


def _without(run: Run) -> str:
    return "the teacher ran in the training loop" if run.setting("online_teacher") else "the recipe needs no teacher"


def _one(before: str, figures: Mapping[str, Any]) -> Html:
    if not figures.get("samples_done"):
        return missing(f"{before}the cache at {figures['cache']} holds no sample yet")
    complete = (
        "" if figures["complete"] else f", incomplete: {figures['samples_done']:,} of {figures['samples']:,} samples done"
    )
    size = f"{figures['bytes'] / 1e6:,.1f} MB on disk"
    words = f"{before}{figures['cache']} ({figures['format']}{complete}): {figures['samples_done']:,} samples, {size}."
    return joined([small(words), cache_table(figures, figures["samples_done"])])


def cache_table(figures: Mapping[str, Any], samples: int) -> Html:
    """Bytes a sample by target, stored and dense; the rows add up to what is printed below them.

    ``figures``: ``bytes``, ``bytes_by_field``, ``dense_bytes_by_field`` and, for tensors that are kept once, ``tensor_bytes``.
    """
    stored, dense = dict[str, int](), figures["dense_bytes_by_field"]
    for name, size in figures["bytes_by_field"].items():
        stored[_target(name)] = stored.get(_target(name), 0) + size
    once = figures.get("tensor_bytes", 0)
    rows = {_NAMES[name]: (size, dense.get(name)) for name, size in stored.items() if name != "ids"}
    rows |= {_NAMES["ids"]: (stored["ids"], None)} if "ids" in stored else {}
    rows |= {"kept once for all samples": (once, None)} if once else {}
    rest = figures["bytes"] - sum(size for size, _ in rows.values())
    rows |= {"names, indexes and checksums of files": (rest, None)} if rest > 0 else {}
    kept, kept_total = adding_up([size / samples / 1000 for size, _ in rows.values()], 2)
    full, full_total = adding_up([(size or 0) / samples / 1000 for _, size in rows.values()], 2)
    lines = [
        [name, f"{size} kB", f"{other} kB" if as_dense else "–", _ratio(as_dense, as_stored)]
        for (name, (as_stored, as_dense)), size, other in zip(rows.items(), kept, full, strict=True)
    ]
    total, total_dense = sum(size for size, _ in rows.values()), sum(size or 0 for _, size in rows.values())
    lines.append(["in all", f"{kept_total} kB", f"{full_total} kB", _ratio(total_dense, total)])
    heads = ["bytes a sample", "stored", "dense, 16 bits", "ratio"]
    return table(heads, lines, numbers=(1, 2, 3), total=True)


def _target(field: str) -> str:
    """What a field of a row belongs to: everything that is neither attention, vision tokens nor ids describes logits."""
    if field in _IDS:
        return "ids"
    return "attention" if attention_layer(field) is not None else "vision_tokens" if field == "vision_tokens" else "logits"


def _ratio(dense: int | None, stored: int) -> str:
    return f"1 : {dense / stored:,.1f}" if dense and stored else ""
