"""Where the values of a row can lie: whatever lies elsewhere was not written by a teacher.

Everything is read from the encoded parts, for many values at once: nothing is decoded. Attention is in
:mod:`alignkd.cache_store.rows.probabilities`.

Shapes: A answers, K kept tokens.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignkd.cache_store.codecs import Array
from alignkd.cache_store.rows.kinds import Sizes, is_attention
from alignkd.cache_store.rows.probabilities import probabilities
from alignkd.cache_store.rows.values import SLACK, Check, Found, Values

LOWEST_TAIL = -100.0
"""Log of the mass of an empty tail."""

LEVELS_PER_E, FINE, LOWEST_CODE = 12.0, 0.3, 58
"""The levels of log-probabilities: code c is 0.3 (1 - e^(c / 12)), down to -36."""

_FLOAT32_MAX = float(np.finfo(np.float32).max)


def checks_of(name: str, sizes: Sizes | None) -> list[Check]:
    """The checks of a field: its stored numbers are finite; and what its name promises, in a teacher's cache."""
    checks: list[Check] = [_finite]
    if sizes is None:
        return checks
    if is_attention(name):
        return [*checks, probabilities]
    if name in ("topk_rank_steps", "draw_rank_steps"):
        checks.append(partial(_ranks, ids=sizes.ids, unique=name == "topk_rank_steps"))
    if name in ("topk_logprob_codes", "draw_logprob_codes"):
        checks.append(_codes)
    more: dict[str, Check] = {
        "tail_logmass": _tail,
        "spans": _spans,
        "regions": _regions,
        "input_ids": partial(_ids, sizes=sizes),
    }
    return [*checks, more[name]] if name in more else checks


def masses(codes: Values, tail: Values) -> Found:
    """Kept tokens [A, K] and tail [A] together have the probability 1, within the codes' steps."""
    width = next((shape[1] for shape in codes.shapes if shape[0]), 0)
    if not width:
        return None
    head_A = _head_mass(codes.parts["values"].reshape(-1, width)[:: codes.stride])
    tail_A = np.exp(tail.parts["values"][:: codes.stride].astype(np.float32))
    bad_A = (head_A.real + tail_A * (1 - SLACK) > 1 + SLACK) | (head_A.imag + tail_A * (1 + SLACK) < 1 - SLACK)
    if not bad_A.any():
        return None
    at = int(bad_A.argmax())
    found = f"between {head_A.real[at] + tail_A[at]:.3g} and {head_A.imag[at] + tail_A[at]:.3g}"
    return tail.holding("values", at * codes.stride), f"found kept tokens and tail with a probability {found}, expected 1"


def _head_mass(codes_AK: NDArray[np.uint8]) -> NDArray[np.complex64]:
    """The least and the largest mass of the kept tokens, as the two parts of a complex number: one look-up gives both."""
    if codes_AK.shape[1] % 2:
        single: NDArray[np.complex64] = _bounds()[codes_AK].sum(axis=1)
        return single
    pairs: NDArray[np.complex64] = _pair_bounds()[np.ascontiguousarray(codes_AK).view(np.uint16)].sum(axis=1)
    return pairs


@cache
def _bounds() -> NDArray[np.complex64]:
    """The least and the largest probability that has each code."""
    codes = np.arange(256, dtype=np.float64)
    low, high = (np.exp(FINE * (1 - np.exp((codes + half) / LEVELS_PER_E))) for half in (0.5, -0.5))
    low[codes >= LOWEST_CODE] = 0
    return np.asarray(low + 1j * np.minimum(high, 1), np.complex64)


@cache
def _pair_bounds() -> NDArray[np.complex64]:
    """The same for the sum of two codes, which are read as one number."""
    both = np.arange(1 << 16)
    found: NDArray[np.complex64] = _bounds()[both & 255] + _bounds()[both >> 8]
    return found


def _finite(values: Values) -> Found:
    for part, array in values.parts.items():
        if array.dtype.kind == "f" and array.size and (found := _out_of_range(values, part, array)):
            return found
    return None


def _out_of_range(values: Values, part: str, array: Array) -> Found:
    least = 0.0 if part == "scales" else -np.inf
    most = _FLOAT32_MAX / 126.99 if part == "scales" and array.itemsize == 4 else np.inf
    if array.itemsize == 2:  # numpy converts 16-bit floats one by one; their bits are in the order of their sizes
        bits = array.view("<u2")
        sound = int((bits if part == "scales" else bits & 0x7FFF).max()) < 0x7C00
    else:
        smallest, largest = float(array.min()), float(array.max())
        sound = bool(np.isfinite(smallest) and np.isfinite(largest) and least <= smallest and largest <= most)
    if sound:
        return None
    wide = array.astype(np.float64)
    bad = ~(np.isfinite(wide) & (wide >= least) & (wide <= most)) | (np.signbit(wide) if part == "scales" else False)
    at = int(bad.argmax())
    expected = "a scale of 0 or more" if part == "scales" else "a finite number"
    return values.holding(part, at), f"{part}: found {wide[at]:g}, expected {expected}"


def _ranks(values: Values, *, ids: int | None, unique: bool) -> Found:
    """Steps between sorted ranks: all ranks inside the vocabulary, and none twice where they must differ."""
    width = next((shape[1] for shape in values.shapes if shape[0]), 0)
    if not width:
        return None
    steps = values.parts["values"].reshape(-1, width)
    last = steps.sum(axis=1, dtype=np.uint32 if steps.itemsize == 2 else np.uint64)
    if ids is not None and int(last.max()) >= ids:
        at = int(last.argmax())
        return values.holding("values", at * width), f"found rank {last[at]}, expected less than {ids}"
    some = steps[:: values.stride, 1:]
    if unique and some.size and int(some.min()) == 0:
        at = int((some.min(axis=1) == 0).argmax()) * values.stride
        return values.holding("values", at * width), "found a token twice among the kept ones"
    return None


def _codes(values: Values) -> Found:
    codes = values.parts["values"]
    if codes.size and int(codes.max()) > LOWEST_CODE:
        at = int(codes.argmax())
        return values.holding("values", at), f"found code {codes[at]}, expected at most {LOWEST_CODE}"
    return None


def _tail(values: Values) -> Found:
    logs = values.parts["values"].astype(np.float32)
    if logs.size and not (float(logs.min()) >= LOWEST_TAIL and float(logs.max()) <= SLACK):
        at = int(((logs < LOWEST_TAIL) | (logs > SLACK)).argmax())
        return values.holding("values", at), f"found a log mass of {logs[at]:g}, expected {LOWEST_TAIL:g} to 0"
    return None


def _ids(values: Values, *, sizes: Sizes) -> Found:
    ids = values.parts["values"]
    if sizes.vocabulary is None or not ids.size:
        return None
    # Negative ids are large numbers without a sign.
    bad = ids.view("<u4") >= sizes.vocabulary
    if sizes.image_token_id is not None:
        bad &= ids != sizes.image_token_id
    if not bad.any():
        return None
    at = int(bad.argmax())
    return values.holding("values", at), f"found id {ids[at]}, expected 0 to {sizes.vocabulary - 1}"


def _spans(values: Values) -> Found:
    spans = values.parts["values"].reshape(-1, 2)
    bad = (spans[:, 0] < 0) | (spans[:, 1] < spans[:, 0])
    if not bad.any():
        return None
    at = int(bad.argmax())
    return values.holding("values", 2 * at), f"found the characters {spans[at].tolist()}, expected first and last"


def _regions(values: Values) -> Found:
    regions: NDArray[Any] = values.parts["values"].reshape(-1, 8)
    counts, boxes = regions[:, :4], regions[:, 4:]
    bad = (counts < 0).any(axis=1) | (counts >= 1 << 24).any(axis=1) | (counts != np.floor(counts)).any(axis=1)
    bad |= (boxes[:, 2] < boxes[:, 0]) | (boxes[:, 3] < boxes[:, 1])
    if not bad.any():
        return None
    at = int(bad.argmax())
    return values.holding("values", 8 * at), f"found the region {regions[at].tolist()}, expected a grid of tokens and its box"
