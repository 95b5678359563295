"""Codecs keep their stated bound for every array that they accept."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from reference.codec_errors import error_bound

from alignkd.cache_store.codecs import CODECS, get_codec
from alignkd.cache_store.codecs.nibbles import pack_nibbles, packed_shape, unpack_nibbles
from alignkd.errors import ConfigError

FLOAT32_MAX = float(np.finfo(np.float32).max)
INT4_LARGEST = 7 * 65504.0
QUANTISING = ("float16", "int8-rows", "int4-blocks", "sqrt8", "sqrt4", "nats8")


def arrays(
    dtype: str, min_dims: int = 0, largest: float | None = None, smallest: float | None = None
) -> st.SearchStrategy[np.ndarray]:
    shapes = hnp.array_shapes(min_dims=min_dims, max_dims=4, min_side=0, max_side=5)
    if min_dims == 0:
        shapes = st.just(()) | shapes
    bounds = {} if largest is None else {"min_value": -largest if smallest is None else smallest, "max_value": largest}
    elements = st.floats(width=32, allow_nan=False, allow_infinity=False, **bounds) if dtype == "float32" else None
    return hnp.arrays(dtype, shapes, elements=elements)


def long_rows(smallest: float, largest: float) -> st.SearchStrategy[np.ndarray]:
    """Rows of more than one block and of any remainder."""
    elements = st.floats(width=32, min_value=smallest, max_value=largest, allow_nan=False)
    shapes = st.tuples(st.integers(1, 2), st.integers(60, 200))
    return hnp.arrays("float32", shapes, elements=elements, fill=st.just(0.0))


def attention(shape: tuple[int, ...]) -> np.ndarray:
    """Rows of probabilities, a third of their mass elsewhere."""
    scores = np.exp(np.random.default_rng(0).normal(0, 1.5, shape))
    return (scores / (1.5 * scores.sum(axis=-1, keepdims=True))).astype(np.float32)


def roundtrip(name: str, array: np.ndarray) -> np.ndarray:
    codec = get_codec(name)
    return codec.decode(codec.encode(array), array.shape)


def assert_bound_holds(name: str, array: np.ndarray) -> None:
    codec = get_codec(name)
    parts = codec.encode(array)
    layout = codec.layout(array.shape, array.dtype)
    assert {part: (a.shape, a.dtype) for part, a in parts.items()} == layout
    for given_parts in (parts, {part: a.reshape(-1) for part, a in parts.items()}):
        decoded = codec.decode(given_parts, array.shape)
        assert (decoded.shape, decoded.dtype) == (array.shape, array.dtype)
        error = np.abs(decoded.astype(np.float64) - array.astype(np.float64))
        assert (error <= error_bound(name, array)).all()


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


@settings(max_examples=300, deadline=None)
@given(arrays("float32", min_dims=1, largest=INT4_LARGEST) | long_rows(-INT4_LARGEST, INT4_LARGEST))
@example(np.array([INT4_LARGEST, -INT4_LARGEST, 1.0], np.float32))
@example(np.array([1.4e-45, 0.0, 1e-43, 5e-8], np.float32))
def test_int4_blocks_keeps_its_bound(array):
    assert_bound_holds("int4-blocks", array)


@pytest.mark.parametrize("name", ["sqrt8", "sqrt4"])
@settings(max_examples=300, deadline=None)
@given(array=arrays("float32", min_dims=1, smallest=0, largest=65504) | long_rows(0, 1) | long_rows(0, 65504))
@example(array=np.array([65504.0, 65503.0, 0.0, 1.4e-45], np.float32))
@example(array=np.array([[1e-44, 1.17e-38], [0.0, -0.0], [5.9e-8, 1.0]], np.float32))
def test_square_roots_keep_their_bound_and_zeros_stay_zeros(name, array):
    assert_bound_holds(name, array)
    codec = get_codec(name)
    assert not codec.decode(codec.encode(array), array.shape)[array == 0].any()


@settings(max_examples=300, deadline=None)
@given(array=arrays("float32", smallest=0, largest=32) | long_rows(0, 32) | long_rows(0, 2**-7))
@example(array=np.array([32.0, 0.0, -0.0, 1.4e-45, 32 * (0.5 / 255) ** 2], np.float32))
def test_nats8_keeps_its_bound_zeros_stay_zeros_and_the_largest_value_stays(array):
    assert_bound_holds("nats8", array)
    decoded = roundtrip("nats8", array)
    assert not decoded[array == 0].any()
    assert (decoded[array == 32] == 32).all()


@pytest.mark.parametrize("values", [[-1e-30], [32.0001], [np.nan], [np.inf]])
def test_nats8_refuses_what_it_cannot_hold(values):
    with pytest.raises(ConfigError, match="nats8"):
        get_codec("nats8").encode(np.array(values, np.float32))


@pytest.mark.parametrize("name", ["int8-rows", "int4-blocks"])
@pytest.mark.parametrize("scale", [1e-42, 1e-37, 1.0, 1e4, 1e37])
def test_integers_keep_their_bound_on_many_values(name, scale):
    if (name, scale) == ("int4-blocks", 1e37):
        scale = 1e5
    values = np.random.default_rng(0).standard_normal((200, 500)) * scale
    assert_bound_holds(name, values.clip(-INT4_LARGEST, INT4_LARGEST).astype(np.float32))


@pytest.mark.parametrize("name", ["sqrt8", "sqrt4"])
@pytest.mark.parametrize("scale", [1e-42, 1e-8, 1e-3, 1.0, 1e4])
def test_square_roots_keep_their_bound_on_many_values(name, scale):
    values = np.random.default_rng(0).exponential(1.0, (200, 500)) ** 2 * scale
    assert_bound_holds(name, values.clip(0, 65504).astype(np.float32))


@pytest.mark.parametrize(("name", "levels"), [("sqrt8", 255), ("sqrt4", 15)])
def test_the_bound_of_square_roots_is_what_their_docstring_says(name, levels):
    array = attention((50, 144))
    scale = array.max(axis=-1, keepdims=True).astype(np.float64) * (1 + 2**-10)
    stated = np.sqrt(array * scale) / levels + scale / (2 * levels) ** 2
    assert (error_bound(name, array) <= stated * 1.001).all()


@pytest.mark.parametrize(("name", "other"), [("sqrt8", "int8-rows"), ("sqrt4", "int4-blocks")])
def test_probabilities_lose_less_as_square_roots_than_as_integers_of_as_many_bits(name, other):
    array = attention((4, 100, 144))
    error = {codec: np.square(roundtrip(codec, array) - array).mean() for codec in (name, other)}
    assert error[name] < 0.7 * error[other]


def test_the_bound_of_int4_blocks_is_about_half_a_step_of_its_own_block():
    array = np.random.default_rng(0).standard_normal((50, 200)).astype(np.float32)
    array[:, 64:128] *= 100
    bound = error_bound("int4-blocks", array)
    for first in range(0, 200, 64):
        block = np.abs(array[:, first : first + 64])
        assert (bound[:, first : first + 64] <= block.max(axis=-1, keepdims=True) / 14 * 1.002).all()


@pytest.mark.parametrize("name", ["exact", "float16", "int8-rows", "int4-blocks", "sqrt8", "sqrt4"])
@settings(max_examples=50, deadline=None)
@given(array=arrays("float32", min_dims=2, smallest=0, largest=60000), more=st.tuples(*[st.integers(0, 70)] * 4))
def test_parts_of_an_array_with_zeros_beyond_its_end_are_its_parts_with_zeros_beyond_theirs(name, array, more):
    """What lets a batch be padded before it is decoded."""
    codec = get_codec(name)
    padded = np.pad(array, [(0, count) for count in more[: array.ndim]])
    for part, values in codec.encode(padded).items():
        own = codec.encode(array)[part]
        corner = tuple(map(slice, own.shape))
        assert np.array_equal(values[corner], own)
        values[corner] = 0
        assert not values.any()


@pytest.mark.parametrize(("name", "nbytes"), [("sqrt8", 32 * 200 * (144 + 2)), ("sqrt4", 32 * 200 * (72 + 2))])
def test_attention_takes_a_byte_or_half_a_byte_a_probability(name, nbytes):
    layout = get_codec(name).layout((32, 200, 144), np.dtype("float32"))
    assert sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in layout.values()) == nbytes


@pytest.mark.parametrize(("name", "nbytes"), [("int8-rows", 144 * (4096 + 4)), ("int4-blocks", 144 * (2048 + 128))])
def test_vision_tokens_take_a_byte_or_half_a_byte_a_number(name, nbytes):
    layout = get_codec(name).layout((144, 4096), np.dtype("float32"))
    assert sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in layout.values()) == nbytes <= 600_000


@settings(max_examples=100, deadline=None)
@given(hnp.arrays("uint8", hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=7), elements=st.integers(0, 15)))
def test_two_codes_share_a_byte_and_come_back(codes):
    packed = pack_nibbles(codes)
    assert (packed.shape, packed.dtype) == (packed_shape(codes.shape), np.uint8)
    assert np.array_equal(unpack_nibbles(packed.reshape(-1), codes.shape), codes)


def test_the_bound_of_int8_rows_is_about_half_a_step():
    array = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32)
    half_step = np.abs(array).max(axis=-1, keepdims=True) / 254
    assert (error_bound("int8-rows", array) <= half_step * 1.001).all()


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(["int8", "int32", "uint16", "int64", "float16", "float32", "float64"]).flatmap(arrays))
def test_exact_is_exact(array):
    codec = get_codec("exact")
    decoded = codec.decode(codec.encode(array), array.shape)
    assert (decoded.shape, decoded.dtype) == (array.shape, array.dtype)
    assert decoded.tobytes() == array.tobytes()
    assert not error_bound("exact", array).any()


def test_exact_keeps_big_endian_and_strided_values():
    array = np.arange(12, dtype=">i4").reshape(3, 4).T
    codec = get_codec("exact")
    parts = codec.encode(array)
    assert parts["values"].dtype.str == "<i4"
    assert np.array_equal(codec.decode(parts, array.shape), array)


@pytest.mark.parametrize("name", QUANTISING)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(name, value):
    with pytest.raises(ValueError, match="finite"):
        get_codec(name).encode(np.array([1, value], np.float32))


@pytest.mark.parametrize(("name", "largest"), [("float16", 65504), ("sqrt8", 65504), ("sqrt4", 65504), ("int4-blocks", 458528)])
def test_a_codec_refuses_what_its_float16_cannot_hold(name, largest):
    get_codec(name).encode(np.array([largest], np.float32))
    with pytest.raises(ValueError, match=f"up to {largest}, found {largest + 1}"):
        get_codec(name).encode(np.array([largest + 1], np.float32))


@pytest.mark.parametrize("name", ["sqrt8", "sqrt4"])
def test_square_roots_refuse_negative_values(name):
    with pytest.raises(ValueError, match=r"values of 0 and more, found -0\.5: use 'int8-rows'"):
        get_codec(name).encode(np.array([1, -0.5], np.float32))


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float64") for name in QUANTISING), ("int8-rows", "int32"), ("exact", "complex64")]
)
def test_dtypes_that_a_codec_does_not_store_are_refused(name, dtype):
    with pytest.raises(ValueError, match=dtype):
        get_codec(name).encode(np.zeros(2, dtype))


def test_exact_never_stores_objects():
    with pytest.raises(ValueError, match="object"):
        get_codec("exact").encode(np.array([None]))


@pytest.mark.parametrize("name", [name for name in QUANTISING if name not in ("float16", "nats8")])
def test_a_codec_with_scales_refuses_a_scalar(name):
    with pytest.raises(ValueError, match="at least 1 dimension"):
        get_codec(name).encode(np.array(1, np.float32))


def test_an_unknown_codec_is_refused_with_the_known_names():
    with pytest.raises(ValueError, match=", ".join(sorted(CODECS))):
        get_codec("zip")
    assert {"exact", *QUANTISING} <= set(CODECS)
