"""Compare the rows of an open shard with what a teacher could have written: counts from its ids, then the values.

Sizes of all rows are compared when a shard is opened. Values are checked once each: those of a shard whose arrays lie in memory
at once, others when they are first read.

Shapes: L ids, T text rows, V vision columns, A answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from alignkd.cache_store.codecs import Array
from alignkd.cache_store.rows.kinds import Sizes, answer_fields, check_forms, fixed_axes, is_attention
from alignkd.cache_store.rows.quick import Quick, quick_of
from alignkd.cache_store.rows.ranges import checks_of, masses
from alignkd.cache_store.rows.shard import ColumnShard, Shard
from alignkd.cache_store.rows.spec import CacheSpec
from alignkd.cache_store.rows.values import Check, Values

Refuse = Callable[[str], Exception]
"""Makes the error about a shard from what is wrong with it."""

IGNORED = -100
"""The label of a token that is not supervised."""

_STRIDE = 8
_KEPT, _TAIL = "topk_logprob_codes", "tail_logmass"


class RowChecks:
    """The checks of the rows of one cache.

    ``thorough``: all sums are formed, and all kept tokens compared. A reader forms those of every eighth row of attention and
    of every eighth answer: that finds a field that is wrong as a whole, and costs little.
    """

    def __init__(self, spec: CacheSpec, *, thorough: bool = False) -> None:
        self.spec, self.thorough = spec, thorough
        self.sizes = Sizes.of(spec.fingerprint)
        if self.sizes is not None:
            check_forms(spec)
        self.of_field: dict[str, list[Check]] = {field.name: checks_of(field.name, self.sizes) for field in spec.fields}
        names = set(self.of_field)
        self.attention = [name for name in self.of_field if is_attention(name)]
        self.answers = answer_fields(spec)
        self.stride = 1 if thorough else _STRIDE
        self.counted = [(name, axis, which) for name in self.attention for axis, which in ((1, 0), (2, 1))]
        self.counted += [("vision_tokens", 0, 1)] if "vision_tokens" in names else []
        self.counted += [(name, 0, 2) for name in self.answers]
        """Field, axis, and which of the counts of :func:`_count` the axis has."""
        of_codec = {field.name: field.codec for field in spec.fields}
        self.quick: dict[str, Quick | None] = {
            name: quick_of(name, codec, self.sizes) if self.sizes is not None else None for name, codec in of_codec.items()
        }
        self.with_masses = self.sizes is not None and {_KEPT, _TAIL} <= names
        self.with_counts = self.sizes is not None and {"input_ids", "labels"} <= names

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(RowChecks, thorough=self.thorough), (self.spec,)

    def check(self, shard: Shard, done: dict[str, bytearray], refuse: Refuse) -> None:
        """Check the sizes of ``shard``, and its values now or when they are read, but for those that are ``done``.

        ``done`` has a byte for each value of each field, and is kept up to date.

        Raises what ``refuse`` makes: some row is impossible.
        """
        if self.sizes is not None:
            self._check_sizes(shard, refuse)
        for field in shard.spec.fields:
            done.setdefault(field.name, bytearray(len(shard.shapes[field.name])))
        reading = _Reading(self, done, refuse)
        if isinstance(shard, ColumnShard):
            reading.check_columns(shard)
        else:
            shard.on_read = reading

    def _check_sizes(self, shard: Shard, refuse: Refuse) -> None:
        assert self.sizes is not None
        for name in self.of_field:
            for axis, size in fixed_axes(name, self.sizes).items():
                differing = np.flatnonzero(shard.shapes[name][:, axis] != size)
                if len(differing):
                    found = shard.shapes[name][differing[0]].tolist()
                    raise refuse(_at(shard, name, int(differing[0]), f"found shape {found}, expected {size} in axis {axis}"))
        for name in self.answers:
            if shard.shapes[name].shape[1] == 2:
                self._check_constant(name, shard, refuse)
        for names, axis in ((self.answers, 0), (self.attention, 1), (self.attention, 2), (["input_ids", "labels"], 0)):
            self._check_equal([name for name in names if name in self.of_field], axis, shard, refuse)

    @staticmethod
    def _check_constant(name: str, shard: Shard, refuse: Refuse) -> None:
        widths = shard.shapes[name][:, 1]
        if len(widths) and (widths != widths[0]).any():
            i = int((widths != widths[0]).argmax())
            raise refuse(_at(shard, name, i, f"found {widths[i]} in axis 1, where the first row has {widths[0]}"))

    @staticmethod
    def _check_equal(names: list[str], axis: int, shard: Shard, refuse: Refuse) -> None:
        for name in names[1:]:
            # None of these fields is shared by rows, so that value i is that of row i.
            one, other = shard.shapes[names[0]][:, axis], shard.shapes[name][:, axis]
            differing = np.flatnonzero(one != other) if len(one) == len(other) else np.zeros(1, np.int64)
            if len(differing):
                i = int(differing[0])
                raise refuse(_at(shard, name, i, f"found {other[i]} in axis {axis}, where {names[0]!r} has {one[i]}"))

    def check_labels(self, shard: Shard, rows: range, ids: Array, labels: Array, refuse: Refuse) -> None:
        """Compare the other fields of some rows with their ids and labels, which follow each other."""
        assert self.sizes is not None
        lengths = [shard.shape("labels", i)[0] for i in rows]
        if self.sizes.image_token_id is None or self.sizes.tokens_per_placeholder is None or not len(lengths):
            return
        supervised = labels != IGNORED
        if (wrong := supervised & (labels != ids)).any():
            at = int(wrong.argmax())
            i = rows[int(np.searchsorted(np.cumsum(lengths), at, side="right"))]
            raise refuse(_row(shard, i, "labels", f"found label {labels[at]}, expected {IGNORED} or the id in its place"))
        if self.answers and self.sizes.ids is not None and labels.size and int(labels.max()) >= self.sizes.ids:
            i = rows[int(np.searchsorted(np.cumsum(lengths), int(labels.argmax()), side="right"))]
            raise refuse(_row(shard, i, "labels", f"found label {labels.max()}, expected less than {self.sizes.ids}"))
        counts = _count(lengths, supervised, ids == self.sizes.image_token_id)
        for i, (texts, images, answers) in zip(rows, counts, strict=True):
            expected = texts, images * self.sizes.tokens_per_placeholder, answers
            for name, axis, which in self.counted:
                if (found := shard.shape(name, i)[axis]) != expected[which]:
                    why = f"found {found} in axis {axis}, expected {expected[which]}: as many as its ids and labels have"
                    raise refuse(_row(shard, i, name, why))

    def counts_match(self, shard: Shard, i: int, ids: Array, labels: Array) -> bool:
        """Whether a row has as many of everything as its ids and labels say."""
        assert self.sizes is not None
        if self.sizes.image_token_id is None or self.sizes.tokens_per_placeholder is None:
            return False
        ((texts, images, answers),) = _count([len(ids)], labels != IGNORED, ids == self.sizes.image_token_id)
        expected = texts, images * self.sizes.tokens_per_placeholder, answers
        return all(shard.shape(name, i)[axis] == expected[which] for name, axis, which in self.counted)

    def check_regions(self, shard: Shard, i: int, ids: Array, regions: Array, refuse: Refuse) -> None:
        """Compare the grids of a row's regions, where it has any, with its ids."""
        assert self.sizes is not None
        sizes, grids = self.sizes, regions.reshape(-1, 8)[:, 1:4].astype(np.int64)
        if not len(grids) or sizes.image_token_id is None or sizes.tokens_per_placeholder is None:
            return
        found = int((grids[:, 0] * (grids[:, 1] + grids[:, 2])).sum())
        expected = int(np.count_nonzero(ids == sizes.image_token_id)) * sizes.tokens_per_placeholder
        if found != expected:
            raise refuse(
                _row(shard, i, "regions", f"found {found} vision tokens, expected {expected}, as many as its ids have")
            )


def _count(lengths: Sequence[int], supervised: Array, is_image: Array) -> list[tuple[int, int, int]]:
    """Text rows after the first image, placeholders and answers of each row."""
    supervised, counts, start = supervised & ~is_image, [], 0
    for length in lengths:
        stop = start + length
        own = is_image[start:stop]
        images = int(np.count_nonzero(own))
        after = length - int(own.argmax()) - images if images else 0
        # The first token is predicted by none.
        counts.append((after, images, int(np.count_nonzero(supervised[start + 1 : stop]))))
        start = stop
    return counts


class _Reading:
    """Checks the values of one shard, each once. It does not hold the shard, which would then hold itself in memory."""

    def __init__(self, checks: RowChecks, done: dict[str, bytearray], refuse: Refuse) -> None:
        self.checks, self.done, self.refuse = checks, done, refuse
        self.codecs = {field.name: field.codec for field in checks.spec.fields}
        self.last: dict[str, tuple[int, Values]] = {}
        self.read: dict[str, int] = {}
        self.ids = (-1, np.zeros(0, np.int32))

    def check_columns(self, shard: ColumnShard) -> None:
        """Check all values at once."""
        if not any(0 in done for done in self.done.values()):
            return
        held: dict[str, Values] = {}
        for field in shard.spec.fields:
            shapes = [tuple(shape) for shape in shard.shapes[field.name].tolist()]
            parts, offsets = shard.parts[field.name], shard.offsets[field.name]
            held[field.name] = Values(field.codec, shapes, parts, offsets, self.checks.stride)
            self._check(shard, field.name, held[field.name], None)
        if self.checks.with_masses and (found := masses(held[_KEPT], held[_TAIL])):
            raise self.refuse(_at(shard, _TAIL, *found))
        if self.checks.with_counts:
            ids, labels = (shard.parts[name]["values"] for name in ("input_ids", "labels"))
            self.checks.check_labels(shard, range(len(shard)), ids, labels, self.refuse)
            for i in range(len(shard)) if "regions" in held else ():
                own_ids, regions = (shard.part(name, "values", i) for name in ("input_ids", "regions"))
                self.checks.check_regions(shard, i, own_ids, regions, self.refuse)
        for done in self.done.values():
            done[:] = b"\1" * len(done)

    def __call__(self, shard: Shard, name: str, i: int, parts: dict[str, Array]) -> None:
        """Check the value of a field in row ``i``, which was read just now."""
        value = shard.value_of_row[name][i]
        if self.done[name][value]:
            return
        if self._may_be_quick(name, parts) and self._is_possible(shard, name, i, parts):
            self.done[name][value] = 1
            return
        offsets = {part: (0, array.size) for part, array in parts.items()}
        one = Values(self.codecs[name], [shard.shape(name, i)], parts, offsets, self.checks.stride)
        self._check(shard, name, one, i)
        if name in (_KEPT, "input_ids"):
            self.last[name] = (i, one)
        elif name == _TAIL and self.checks.with_masses:
            if found := masses(self._other(shard, _KEPT, i), one):
                raise self.refuse(_row(shard, i, name, found[1]))
        elif name in ("labels", "regions") and self.checks.with_counts:
            ids, values = self._other(shard, "input_ids", i).parts["values"], parts["values"]
            if name == "labels":
                self.checks.check_labels(shard, range(i, i + 1), ids, values, self.refuse)
            else:
                self.checks.check_regions(shard, i, ids, values, self.refuse)
        self.done[name][value] = 1

    def _may_be_quick(self, name: str, parts: dict[str, Array]) -> bool:
        """Whether this is not one of the values, the first and every eighth that is not empty, that all checks are for."""
        if any(array.size for array in parts.values()):
            self.read[name] = self.read.get(name, -1) + 1
        return self.read.get(name, 0) % self.checks.stride != 0

    def _is_possible(self, shard: Shard, name: str, i: int, parts: dict[str, Array]) -> bool:
        """A short proof that the value is possible; False where there is none."""
        if name == "input_ids" and self.checks.with_counts:
            self.ids = i, parts["values"]
            return True
        if name == "labels" and self.checks.with_counts and self.ids[0] == i:
            return self.checks.counts_match(shard, i, self.ids[1], parts["values"])
        quick = self.checks.quick[name]
        return quick is not None and quick(parts, shard.shape(name, i))

    def _other(self, shard: Shard, name: str, i: int) -> Values:
        """Another field of the same row, which was most often read just before."""
        row, values = self.last.get(name, (-1, None))
        if row == i and values is not None:
            return values
        array = shard.part(name, "values", i)
        return Values("exact", [shard.shape(name, i)], {"values": array}, {"values": (0, array.size)}, self.checks.stride)

    def _check(self, shard: Shard, name: str, values: Values, row: int | None) -> None:
        for check in self.checks.of_field[name]:
            if found := check(values):
                message = _at(shard, name, *found) if row is None else _row(shard, row, name, found[1])
                raise self.refuse(message)


def _at(shard: Shard, name: str, value: int, why: str) -> str:
    """What is wrong with a stored value, by the first row that has it."""
    rows = [i for i, number in enumerate(shard.value_of_row[name]) if number == value]
    return _row(shard, rows[0], name, why)


def _row(shard: Shard, i: int, name: str, why: str) -> str:
    row = shard.ids[i]
    return f"row {row.key} (sample {row.sample_id!r}), field {name!r}: {why}"
