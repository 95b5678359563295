"""The term of vision relations: its value and gradient against a dense reference, and what does not change it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkd.losses.more_terms.vision_relations import vision_relations
from alignkd.losses.recipes import get_recipe
from alignkd.losses.term_registry import find_term


def inputs_of(student_BVD, teacher_BVD, mask_BV):
    return SimpleNamespace(
        batch=SimpleNamespace(vision_mask_BV=mask_BV),
        targets=SimpleNamespace(vision_BVD=teacher_BVD),
        student_vision_BVD=student_BVD,
    )


def dense(student_VD, teacher_VD):
    """Of one sample, in float64, token by token."""
    grams = []
    for tokens in (student_VD.double(), teacher_VD.double()):
        rows = [[torch.dot(a, b) / (a.norm() * b.norm()) for b in tokens] for a in tokens]
        grams.append(torch.stack([torch.stack(row) for row in rows]))
    return 1 - (grams[0] * grams[1]).sum() / (grams[0].norm() * grams[1].norm())


def tokens(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6))
def test_value_and_gradient_are_those_of_the_dense_formula(seed, columns, width, teacher_width):
    # Of length 1 to 2: the direction of a token near zero turns faster than single precision can tell.
    student, teacher = (
        torch.nn.functional.normalize(tokens(seed + i, 1, columns, size), dim=2) * (1 + i / 2)
        for i, size in enumerate((width, teacher_width))
    )
    student.requires_grad_()
    value_B = vision_relations(inputs_of(student, teacher, torch.ones(1, columns, dtype=torch.bool)))
    (found,) = torch.autograd.grad(value_B.sum(), student)
    expected = dense(student[0], teacher[0])
    (wanted,) = torch.autograd.grad(expected, student)
    assert value_B.item() == pytest.approx(expected.item(), abs=1e-5)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_sample_has_the_same_value_alone_and_padded_in_a_batch():
    student, teacher = tokens(0, 2, 5, 8), tokens(1, 2, 5, 12)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    student[1, 3:], teacher[1, 3:] = 7.0, float("nan")
    together = vision_relations(inputs_of(student, teacher, mask))
    alone = vision_relations(inputs_of(student[1:, :3], teacher[1:, :3], mask[1:, :3]))
    torch.testing.assert_close(together[1:], alone)


def test_scale_and_rotation_of_the_tokens_change_nothing_and_equal_relations_cost_nothing():
    teacher = tokens(0, 1, 6, 8)
    rotation, _ = torch.linalg.qr(tokens(1, 8, 8))
    value_B = vision_relations(inputs_of(3 * teacher @ rotation, teacher, torch.ones(1, 6, dtype=torch.bool)))
    assert value_B.item() == pytest.approx(0.0, abs=1e-6)


def test_no_tokens_and_tokens_of_zeros_have_finite_gradients():
    student = torch.zeros(2, 4, 8, requires_grad=True)
    mask = torch.tensor([[True] * 4, [False] * 4])
    value_B = vision_relations(inputs_of(student, tokens(0, 2, 4, 8), mask))
    value_B.sum().backward()
    assert value_B[1] == 0
    assert student.grad.isfinite().all()


def test_it_is_computed_in_single_precision_under_autocast():
    student, teacher = tokens(0, 1, 6, 8), tokens(1, 1, 6, 8)
    given_inputs = inputs_of(student, teacher, torch.ones(1, 6, dtype=torch.bool))
    with torch.autocast("cpu", torch.bfloat16):
        inside = vision_relations(given_inputs)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, vision_relations(given_inputs))


def test_recipes_take_it_by_name_and_know_what_it_needs():
    recipe = get_recipe("sft", {"vision_relations": "0.5"})
    assert recipe.needs == {"vision"}
    assert recipe.weights["vision_relations"] == 0.5
    assert find_term("vision_relations").averaged_over == "with_image"
    assert replace(recipe, extra={}).needs == frozenset()


def test_knowing_its_name_loads_no_torch():
    code = "import sys; from alignkd.losses.recipes import get_recipe; get_recipe('sft', {'vision_relations': '1'})"
    found = subprocess.run([sys.executable, "-c", f"{code}; print('torch' in sys.modules)"], capture_output=True, text=True)
    assert found.stdout.strip() == "False", found.stderr
