"""Maps of heads and widths between teacher and student: how they begin, and which cannot collapse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alignkd.losses.adapters import HeadConvolution, HeadMixture, WidthAdapter, make_head_map
from alignkd.losses.recipes import RECIPES, Recipe
from alignkd.losses.terms import attention_loss, vision_loss

# --- adapters ----------------------------------------------------------------------------------------------------------

HEADS = st.integers(1, 12)


@given(HEADS, HEADS, st.floats(0, 20), st.integers(0, 999))
def test_a_mixture_of_attention_rows_stays_part_of_a_distribution(teacher_heads, student_heads, size, seed):
    generator = torch.Generator().manual_seed(seed)
    attention = torch.randn(2, teacher_heads, 3, 7, generator=generator).mul(3).softmax(3)[..., :5]
    heads = HeadMixture(teacher_heads, student_heads)
    with torch.no_grad():
        heads.logits.copy_(torch.randn(heads.logits.shape, generator=generator) * size)
        mixed = heads(attention)
    assert mixed.shape == (2, student_heads, 3, 5)
    assert (mixed >= 0).all()
    mass, teacher_mass = mixed.sum(3), attention.sum(3)
    assert (mass <= teacher_mass.max(1, keepdim=True).values + 1e-5).all()
    assert (mass >= teacher_mass.min(1, keepdim=True).values - 1e-5).all()


@given(st.integers(2, 12), HEADS, st.sampled_from(["mixture", "convolution"]))
def test_a_head_map_begins_as_an_average_of_teacher_heads(teacher_heads, student_heads, kind):
    heads = make_head_map(kind, teacher_heads, student_heads)
    ones = torch.ones(1, teacher_heads, 1, 1)
    torch.testing.assert_close(heads(ones).detach(), torch.ones(1, student_heads, 1, 1))
    weights = heads(torch.eye(teacher_heads)[:, :, None, None])[:, :, 0, 0].T
    assert (weights >= 0).all()


@pytest.mark.parametrize("kind", [HeadMixture, HeadConvolution])
def test_a_head_map_begins_with_each_student_head_at_its_share_of_the_teachers(kind):
    weights = kind(8, 4)(torch.eye(8)[:, :, None, None])[:, :, 0, 0].T
    assert [w.topk(2).indices.sort().values.tolist() for w in weights] == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize(("teacher_width", "student_width"), [(12, 8), (8, 12), (8, 8)])
def test_width_maps_bring_both_sides_to_one_width(teacher_width, student_width):
    student, teacher = torch.randn(2, 5, student_width), torch.randn(2, 5, teacher_width)
    lifted, target = WidthAdapter(teacher_width, student_width, "lift")(student, teacher)
    assert target is teacher
    assert lifted.shape == teacher.shape
    source, projected = WidthAdapter(teacher_width, student_width, "projection")(student, teacher)
    assert source is student
    assert projected.shape == student.shape
    narrow = [side.shape[-1] for side in WidthAdapter(teacher_width, student_width, "isometry")(student, teacher)]
    assert narrow == [min(teacher_width, student_width)] * 2


@pytest.mark.parametrize(("teacher_width", "student_width"), [(12, 8), (8, 12), (8, 8)])
def test_the_isometry_is_orthonormal_fixed_and_the_same_in_every_run(teacher_width, student_width):
    torch.manual_seed(5)
    one = WidthAdapter(teacher_width, student_width, "isometry")
    torch.manual_seed(6)
    other = WidthAdapter(teacher_width, student_width, "isometry")
    assert torch.equal(one.basis, other.basis)
    assert not list(one.parameters())
    tall = one.basis if teacher_width >= student_width else one.basis.T
    torch.testing.assert_close(tall.T @ tall, torch.eye(min(teacher_width, student_width)), rtol=0, atol=1e-5)


def train_alignment_alone(adapter, student, loss_of, steps=200):
    """Train student values and adapter on an alignment loss alone, with decay of the adapter's weights as AdamW has it.

    Plain gradient descent, one step size for both but for the number of student values that share the mean.
    """
    for _ in range(steps):
        values = [student, *adapter.parameters()]
        gradients = torch.autograd.grad(loss_of(), values)
        with torch.no_grad():
            student -= 0.2 * student.numel() * gradients[0]
            for weight, gradient in zip(values[1:], gradients[1:], strict=True):
                weight -= 0.2 * (gradient + 0.2 * weight)
    return loss_of().item()


def attention_training(kind):
    """Mean size of the target and of the student, relative to the teacher's, after training; and the loss."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(2, 6, 4, 8, generator=generator).mul(2).softmax(3)
    text, vision = torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 8, dtype=torch.bool)
    adapter = make_head_map(kind, 6, 3)
    student = torch.full((2, 3, 4, 8), 0.1).requires_grad_()
    loss = train_alignment_alone(
        adapter, student, lambda: attention_loss(student, adapter(teacher), text, vision, relative_to_uniform=False).mean()
    )
    return (
        adapter(teacher).abs().mean().item() / teacher.mean().item(),
        student.abs().mean().item() / teacher.mean().item(),
        loss,
    )


def vision_training(kind):
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(2, 8, 12, generator=generator)
    vision = torch.ones(2, 8, dtype=torch.bool)
    torch.manual_seed(0)
    adapter = WidthAdapter(12, 6, kind)
    student = torch.randn(2, 8, 6, generator=generator).requires_grad_()

    def loss_of():
        return vision_loss(*adapter(student, teacher), vision, vision, relative_to_variance=False).mean()

    loss = train_alignment_alone(adapter, student, loss_of)
    mapped_student, target = adapter(student, teacher)
    scale = teacher.std().item()
    return target.std().item() / scale, mapped_student.std().item() / scale, loss


def test_the_default_head_map_cannot_collapse_where_a_convolution_does():
    target, student, loss = attention_training("mixture")
    assert target == pytest.approx(1, abs=1e-4)  # the teacher's whole mass, whatever the mixture became
    assert student == pytest.approx(1, abs=0.05)
    target, student, loss = attention_training("convolution")
    assert target < 0.01
    assert student < 0.01
    assert loss < 1e-6  # and the loss calls it a success


def test_the_default_width_map_cannot_collapse_where_a_projection_does():
    target, student, _ = vision_training("lift")
    assert target == 1
    assert student > 0.6  # six of twelve directions explain more than half of the variance
    target, student, loss = vision_training("projection")
    assert target < 0.01
    assert student < 0.01
    assert loss < 1e-6


def test_an_isometry_between_equal_widths_keeps_every_length():
    teacher = torch.randn(1, 4, 6)
    _, target = WidthAdapter(6, 6, "isometry")(teacher, teacher)
    torch.testing.assert_close(target.norm(dim=2), teacher.norm(dim=2))


def test_the_defaults_are_the_maps_that_cannot_collapse():
    assert (Recipe().head_map, Recipe().width_map) == ("mixture", "lift")
    assert (RECIPES["align-kd"].head_map, RECIPES["align-kd"].width_map) == ("mixture", "lift")
