"""How much attention differs over the image: 0 where it is uniform, whatever the padding."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkd.losses.uniformity import attention_contrast


def masks(sizes):
    text, vision = ([size[i] for size in sizes] for i in (0, 1))
    return tuple(
        torch.tensor([[i < n for i in range(max(ns))] for n in ns], dtype=torch.bool).reshape(len(ns), max(ns))
        for ns in (text, vision)
    )


def attention(sizes, heads=2, seed=0, dtype=torch.float32):
    """Random attention, zero where padded."""
    text, vision = masks(sizes)
    shape = (len(sizes), heads, text.shape[1], vision.shape[1])
    values = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).square() / max(vision.shape[1], 1)
    return (values * (text[:, None, :, None] & vision[:, None, None])).to(dtype)


SIZES = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), min_size=1, max_size=4)


def slowly(attention_BHTV, sizes):
    """Row by row, in numpy."""
    samples = []
    for rows_HTV, (T, V) in zip(attention_BHTV.double().numpy(), sizes, strict=True):
        if T and V:
            rows = rows_HTV[:, :T, :V]
            samples.append(np.mean(rows.var(axis=2) / rows.mean(axis=2) ** 2))
    return np.mean(samples) if samples else math.nan


@settings(max_examples=60)
@given(SIZES, st.integers(0, 99))
def test_contrast_is_the_squared_coefficient_of_variation_over_real_columns_averaged(sizes, seed):
    values = attention(sizes, seed=seed)
    found = attention_contrast(values, *masks(sizes))
    assert found.dtype == torch.float32
    assert found.shape == ()
    assert found.item() == pytest.approx(slowly(values, sizes), rel=1e-3, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [1.0, 0.013])
def test_uniform_attention_has_none_however_little_of_it_there_is(dtype, share):
    sizes = [(3, 144), (2, 100)]
    text, vision = masks(sizes)
    uniform = (vision * share / vision.sum(1, keepdim=True))[:, None, None, :] * text[:, None, :, None]
    assert attention_contrast(uniform.to(dtype), text, vision).item() < 1e-5


def test_one_column_alone_has_the_most_and_no_attention_at_all_has_none():
    text, vision = masks([(2, 8)])
    one = torch.zeros(1, 1, 2, 8)
    one[..., 3] = 0.7
    assert attention_contrast(one, text, vision).item() == pytest.approx(7.0, rel=1e-5)
    assert attention_contrast(torch.zeros(1, 1, 2, 8), text, vision).item() == pytest.approx(0, abs=1e-6)


def test_a_batch_without_an_image_has_nothing_to_say():
    for sizes in ([(3, 0)], [(0, 3)]):
        assert attention_contrast(attention(sizes), *masks(sizes)).isnan()


@settings(max_examples=30)
@given(SIZES, st.integers(0, 3), st.integers(0, 3))
def test_padding_changes_nothing_whatever_it_holds(sizes, more_text, more_vision):
    text, vision = masks(sizes)
    values = attention(sizes)
    expected = attention_contrast(values, text, vision)
    pad = torch.nn.functional.pad
    wide_text, wide_vision = pad(text, (0, more_text)), pad(vision, (0, more_vision))
    wide = pad(values, (0, more_vision, 0, more_text))
    real = wide_text[:, None, :, None] & wide_vision[:, None, None]
    rubbish = 1 + torch.arange(wide.numel()).view(wide.shape).square()  # no two alike: equal ones would have no contrast
    found = attention_contrast(torch.where(real, wide, rubbish.float()), wide_text, wide_vision)
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_half_precision_says_what_single_precision_says():
    sizes = [(5, 144), (3, 144)]
    expected = attention_contrast(attention(sizes), *masks(sizes)).item()
    for dtype in (torch.bfloat16, torch.float16):
        assert attention_contrast(attention(sizes, dtype=dtype), *masks(sizes)).item() == pytest.approx(expected, rel=1e-2)
