"""What was found, as the figures of ``--json``: names that stay, numbers, and texts.

Shapes: N samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from alignkd.cache_store.rows.reasons import reason_class
from alignkd.pipeline.check.image_facts import ImageTally
from alignkd.pipeline.check.tally import Found, Named, Tally
from alignkd.pipeline.config.check import CheckConfig
from alignkd.pipeline.config.shared import DEFAULT_MAX_LENGTH, several
from alignkd.pipeline.data.contract import Samples

if TYPE_CHECKING:
    from alignkd.pipeline.check.with_model import CheckedModel

_SIDES = (224, 448, 672, 1344, 2688)
"""Upper ends of the ranges of an image's longer side, in pixels."""
_MISSING = "image missing"


@dataclass(frozen=True)
class Checked:
    """Everything that was found. ``images``: None where they were not read."""

    config: CheckConfig
    samples: Samples
    tallies: dict[str, Tally]
    contents_N: np.ndarray
    images: ImageTally | None
    model: CheckedModel | None


def report(checked: Checked) -> dict[str, Any]:
    """The figures of a check."""
    config, model = checked.config, checked.model
    whole = Tally(config.first)
    for tally in checked.tallies.values():
        whole.merge(tally)
    return {
        "data": list(several(config.data)),
        "images": list(several(config.images)),
        "model": None if model is None else _about_model(config, model),
        "samples": whole.samples,
        "usable": whole.samples - whole.rejected.total,
        "rejected": whole.rejected.total,
        "reasons": _found(whole.rejected, with_class=True),
        "read_otherwise": _found(whole.read_otherwise),
        "duplicates": _duplicates(checked.samples, checked.contents_N, config.first),
        "text_only": whole.images[0],
        "several_images": sum(count for images, count in whole.images.items() if images > 1),
        "images_per_sample": _by_number(whole.images),
        "turns_per_sample": _by_number(whole.turns),
        "system_turns": whole.system_turns,
        "provenances": {name or "data": count for name, count in whole.provenances.most_common()},
        "lengths": {"unit": "characters" if model is None else "positions", **_lengths(whole.lengths)},
        "cut": None if model is None else {"samples": whole.cut.total, "first": _named(whole.cut.named.get("cut", []))},
        "image_files": None if checked.images is None else _images(checked.images),
        "sources": [_source(name or str(checked.samples.path), tally) for name, tally in checked.tallies.items()],
    }


def _about_model(config: CheckConfig, model: CheckedModel) -> dict[str, Any]:
    return {
        "folder": config.model,
        "family": model.family,
        "template": model.template,
        "max_length": config.max_length or DEFAULT_MAX_LENGTH,
        "prompt_date": model.encoder.prompt_date or None,
        "loaded_weights": model.has_weights,
        "assumes_image_size": not config.read_images and model.encoder.needs_sizes,
    }


def _found(found: Found, *, with_class: bool = False) -> list[dict[str, Any]]:
    entries = []
    for kind, count in found.counts.most_common():
        named = found.named[kind]
        about = {"class": reason_class(named[0].what if named else kind)} if with_class else {}
        entries.append({"reason": kind, **about, "samples": count, "first": _named(named)})
    return entries


def _named(named: Sequence[Named]) -> list[dict[str, str]]:
    return [{"id": one.id, "reason": one.what} | ({"source": one.source} if one.source else {}) for one in named]


def _by_number(counts: Counter[int]) -> dict[str, int]:
    return {str(number): counts[number] for number in sorted(counts)}


def _lengths(lengths: Sequence[int]) -> dict[str, Any]:
    """Figures of the lengths of usable samples, and a histogram whose ranges double."""
    found = np.sort(np.asarray(lengths, dtype=np.int64))
    if not len(found):
        return {"least": None, "median": None, "mean": None, "p95": None, "most": None, "histogram": []}
    # A length of 2 ** k begins a range: bit_length of 0 is 0, of 1 is 1, of 2 and 3 is 2.
    edges = [0, *(2**power for power in range(int(found[-1]).bit_length() + 1))]
    counts = np.diff(np.searchsorted(found, edges))
    ranges = [
        {"from": low, "to": high - 1, "samples": int(count)}
        for low, high, count in zip(edges[:-1], edges[1:], counts.tolist(), strict=True)
    ]
    filled = [number for number, one in enumerate(ranges) if one["samples"]]
    return {
        "least": int(found[0]),
        "median": int(found[(len(found) - 1) // 2]),
        "mean": round(float(found.mean()), 1),
        "p95": int(found[(len(found) * 95 - 1) // 100]),
        "most": int(found[-1]),
        "histogram": ranges[filled[0] : filled[-1] + 1],
    }


def _duplicates(samples: Samples, contents_N: np.ndarray, first: int) -> dict[str, Any]:
    """Samples that are there again: with the same key, and with the same content under another id."""
    unique = samples.unique()
    again = np.setdiff1d(np.arange(len(samples)), unique)
    _, position, inverse = np.unique(contents_N[unique], return_index=True, return_inverse=True)
    repeated = np.flatnonzero(position[inverse] != np.arange(len(unique)))
    pairs = [(int(unique[position[inverse[i]]]), int(unique[i])) for i in repeated[:first].tolist()]
    return {
        "same_sample": {"samples": len(again), "first": [_id(samples, int(index)) for index in again[:first]]},
        "same_content": {
            "samples": len(repeated),
            "first": [{"id": _id(samples, copy), "as": _id(samples, original)} for original, copy in pairs],
        },
    }


def _id(samples: Samples, index: int) -> str:
    return samples[index].id or samples.key(index)


def _images(images: ImageTally) -> dict[str, Any]:
    sizes = np.asarray(images.sizes, dtype=np.int64).reshape(-1, 2)
    missing = sum(count for kind, count in images.unreadable.counts.items() if reason_class(kind) == _MISSING)
    return {
        "referenced": images.read,
        "missing": missing,
        "unreadable": images.unreadable.total - missing,
        "reasons": _found(images.unreadable),
        "doubtful": _found(images.doubtful),
        "formats": dict(images.formats.most_common()),
        "longer_sides": _sides(sizes),
        "most_common_sizes": [
            {"width": width, "height": height, "images": count}
            for (width, height), count in Counter(map(tuple, sizes.tolist())).most_common(5)
        ],
    }


def _sides(sizes: np.ndarray) -> list[dict[str, Any]]:
    longer = sizes.max(axis=1) if len(sizes) else np.zeros(0, dtype=np.int64)
    counts = np.bincount(np.searchsorted(_SIDES, longer), minlength=len(_SIDES) + 1).tolist()
    starts, ends = [1, *(side + 1 for side in _SIDES)], [*_SIDES, None]
    return [
        {"from": start, "to": end, "images": count} for start, end, count in zip(starts, ends, counts, strict=True) if count
    ]


def _source(name: str, tally: Tally) -> dict[str, Any]:
    return {
        "name": name,
        "samples": tally.samples,
        "usable": tally.samples - tally.rejected.total,
        "rejected": tally.rejected.total,
        "text_only": tally.images[0],
        "several_images": sum(count for images, count in tally.images.items() if images > 1),
        "lengths": _lengths(tally.lengths),
        "cut": tally.cut.total,
        "reasons": _found(tally.rejected, with_class=True),
    }
