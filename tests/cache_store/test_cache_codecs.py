"""Codecs keep their stated bound for every array that they accept."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from alignkd.cache_store.codecs import CODECS, get_codec

FLOAT32_MAX = float(np.finfo(np.float32).max)


def arrays(dtype: str, min_dims: int = 0, largest: float | None = None) -> st.SearchStrategy[np.ndarray]:
    shapes = hnp.array_shapes(min_dims=min_dims, max_dims=4, min_side=0, max_side=5)
    if min_dims == 0:
        shapes = st.just(()) | shapes
    bounds = {} if largest is None else {"min_value": -largest, "max_value": largest}
    elements = st.floats(width=32, allow_nan=False, allow_infinity=False, **bounds) if dtype == "float32" else None
    return hnp.arrays(dtype, shapes, elements=elements)


def assert_bound_holds(name: str, array: np.ndarray) -> None:
    codec = get_codec(name)
    parts = codec.encode(array)
    layout = codec.layout(array.shape, array.dtype)
    assert {part: (a.shape, a.dtype) for part, a in parts.items()} == layout
    for given_parts in (parts, {part: a.reshape(-1) for part, a in parts.items()}):
        decoded = codec.decode(given_parts, array.shape)
        assert (decoded.shape, decoded.dtype) == (array.shape, array.dtype)
        error = np.abs(decoded.astype(np.float64) - array.astype(np.float64))
        assert (error <= codec.error_bound(array)).all()


@settings(max_examples=150, deadline=None)
@given(arrays("float32", largest=65504.0))
@example(np.array([2.0**-24, 2.0**-25, 65504.0, -0.0, 1 + 2.0**-11], np.float32))
def test_float16_keeps_its_bound(array):
    assert_bound_holds("float16", array)


@settings(max_examples=300, deadline=None)
@given(arrays("float32", min_dims=1))
@example(np.array([FLOAT32_MAX, -FLOAT32_MAX, 1.0], np.float32))
@example(np.array([1.4e-45, 0.0, 1e-43], np.float32))
@example(np.array([[1e-44, 1.17e-38], [0.0, 0.0]], np.float32))
def test_int8_rows_keeps_its_bound(array):
    assert_bound_holds("int8-rows", array)


@pytest.mark.parametrize("scale", [1e-42, 1e-37, 1.0, 1e37])
def test_int8_rows_keeps_its_bound_on_many_values(scale):
    values = np.random.default_rng(0).standard_normal((200, 500)) * scale
    assert_bound_holds("int8-rows", values.astype(np.float32))


def test_the_bound_of_int8_rows_is_about_half_a_step():
    array = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32)
    half_step = np.abs(array).max(axis=-1, keepdims=True) / 254
    assert (get_codec("int8-rows").error_bound(array) <= half_step * 1.001).all()


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(["int8", "int32", "uint16", "int64", "float16", "float32", "float64"]).flatmap(arrays))
def test_exact_is_exact(array):
    codec = get_codec("exact")
    decoded = codec.decode(codec.encode(array), array.shape)
    assert (decoded.shape, decoded.dtype) == (array.shape, array.dtype)
    assert decoded.tobytes() == array.tobytes()
    assert not codec.error_bound(array).any()


def test_exact_keeps_big_endian_and_strided_values():
    array = np.arange(12, dtype=">i4").reshape(3, 4).T
    codec = get_codec("exact")
    parts = codec.encode(array)
    assert parts["values"].dtype.str == "<i4"
    assert np.array_equal(codec.decode(parts, array.shape), array)


@pytest.mark.parametrize("name", ["float16", "int8-rows"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(name, value):
    with pytest.raises(ValueError, match="finite"):
        get_codec(name).encode(np.array([1, value], np.float32))


def test_float16_refuses_what_it_cannot_hold():
    with pytest.raises(ValueError, match="65504"):
        get_codec("float16").encode(np.array([65505], np.float32))


@pytest.mark.parametrize(("name", "dtype"), [("float16", "float64"), ("int8-rows", "int32"), ("exact", "complex64")])
def test_dtypes_that_a_codec_does_not_store_are_refused(name, dtype):
    with pytest.raises(ValueError, match=dtype):
        get_codec(name).encode(np.zeros(2, dtype))


def test_exact_never_stores_objects():
    with pytest.raises(ValueError, match="object"):
        get_codec("exact").encode(np.array([None]))


def test_int8_rows_refuses_a_scalar():
    with pytest.raises(ValueError, match="at least 1 dimension"):
        get_codec("int8-rows").encode(np.array(1, np.float32))


def test_an_unknown_codec_is_refused_with_the_known_names():
    with pytest.raises(ValueError, match="exact, float16, int8-rows"):
        get_codec("zip")
    assert set(CODECS) == {"exact", "float16", "int8-rows"}
