"""What the device decodes is, bit for bit, what the cache's own codec decodes; padding becomes zeros."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from alignkd.cache_store.codecs import get_codec
from alignkd.targets.batch_targets import Targets
from alignkd.targets.dequantise import DEQUANTISERS, Quantised

CODECS = sorted(DEQUANTISERS)


def arrays(dims: int, longest: int, largest: float = 60000) -> st.SearchStrategy[np.ndarray]:
    shapes = st.tuples(*[st.integers(0, 4)] * (dims - 1), st.integers(0, longest))
    elements = st.floats(width=32, min_value=0, max_value=largest, allow_nan=False)
    return hnp.arrays("float32", shapes, elements=elements, fill=elements)


def signed(name: str, array: np.ndarray) -> np.ndarray:
    """Some values turned negative where the codec stores such, and none above what it stores."""
    if name == "nats8":
        return array % 32
    return array if name.startswith("sqrt") else array * np.where(np.arange(array.size).reshape(array.shape) % 3, 1, -1)


def bits(array: np.ndarray) -> list[int]:
    """The bits of each number; plus and minus zero are one."""
    return (array.astype(np.float32) + np.float32(0)).view(np.uint32).ravel().tolist()


def quantised(name: str, rows: list[np.ndarray]) -> Quantised:
    """The encoded parts of each row in a corner of zeros, as a loader pads them."""
    shape = tuple(max(sizes) for sizes in zip(*(row.shape for row in rows), strict=True))
    parts = {}
    for part, (part_shape, dtype) in get_codec(name).layout(shape, np.dtype("float32")).items():
        padded = np.zeros((len(rows), *part_shape), dtype)
        for i, row in enumerate(rows):
            values = get_codec(name).encode(row.astype(np.float32))[part]
            padded[(i, *map(slice, values.shape))] = values
        parts[part] = torch.from_numpy(padded)
    return Quantised(name, (len(rows), *shape), parts)


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 3).flatmap(lambda dims: st.lists(arrays(dims, 150), min_size=1, max_size=3)))
def test_each_sample_of_a_padded_batch_is_decoded_bit_for_bit_as_the_cache_decodes_it_and_padding_to_zeros(name, rows):
    rows = [signed(name, row).astype(np.float32) for row in rows]
    target = quantised(name, rows)
    decoded = target.dequantise()
    assert (tuple(decoded.shape), decoded.dtype) == (target.shape, torch.float32)
    for row, found in zip(rows, decoded.numpy().copy(), strict=True):
        corner = tuple(map(slice, row.shape))
        expected = get_codec(name).decode(get_codec(name).encode(row), row.shape)
        assert bits(found[corner]) == bits(expected)
        found[corner] = 0
        assert not found.any()


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_stored_bytes_decode_as_the_cache_decodes_them(name, data):
    """Codes and scales that no encoder writes, but a stranger may: -8 of four bits, subnormal scales."""
    shape, parts = (2, 67), {}
    for part, (part_shape, dtype) in get_codec(name).layout(shape, np.dtype("float32")).items():
        stored = data.draw(hnp.arrays(f"u{dtype.itemsize}", part_shape)).view(dtype)
        parts[part] = np.where(np.isfinite(stored), stored, dtype.type(0))
    with np.errstate(over="ignore"):
        expected = get_codec(name).decode(parts, shape)
    found = Quantised(name, shape, {part: torch.from_numpy(values) for part, values in parts.items()}).dequantise()
    assert bits(found.numpy()) == bits(expected)


@pytest.mark.parametrize("name", CODECS)
def test_nothing_waits_for_the_device(name):
    """On the meta device there are no values: whatever asked for one would raise."""
    target = quantised(name, [np.ones((3, 4, 130), np.float32)]).map(lambda part: part.to("meta"))
    decoded = target.dequantise()
    assert (decoded.device.type, tuple(decoded.shape), decoded.dtype) == ("meta", target.shape, torch.float32)


@pytest.mark.parametrize("name", CODECS)
def test_decoding_leaves_the_stored_parts_as_they_are(name):
    target = quantised(name, [np.linspace(0, 9, 200, dtype=np.float32).reshape(2, 100)])
    before = {part: values.clone() for part, values in target.parts.items()}
    first, second = target.dequantise().clone(), target.dequantise()
    assert torch.equal(first, second)
    assert all(torch.equal(target.parts[part], values) for part, values in before.items())


def test_quantised_targets_move_with_the_others_and_become_what_the_losses_see():
    attention = np.random.default_rng(0).random((2, 3, 5), dtype=np.float32)
    stored = quantised("sqrt8", [attention])
    targets = Targets({2: stored}, torch.ones(1, 2, 3))
    on_device = targets.to("meta")
    assert {part.device.type for part in on_device.attention[2].parts.values()} == {"meta"}
    assert on_device.attention[2].parts["codes"].dtype == torch.uint8
    seen = targets.dequantise()
    assert torch.equal(seen.attention[2], stored.dequantise())
    assert torch.equal(seen.vision_BVD, torch.ones(1, 2, 3))
    assert targets.attention[2] is stored
