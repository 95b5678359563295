"""The distances between attention maps, and which rows of text they compare."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import IMAGE, batch_of, mixture, sample

from alignkd.capture.attention import capture
from alignkd.inputs.prompts import IGNORE
from alignkd.losses.attention_distance import attention_distance, chosen_rows
from alignkd.models.loading import load_vlm

DISTANCES = ("mse", "kl", "cosine")


def maps(seed, *, samples=2, heads=3, rows=4, columns=6, dtype=torch.float64):
    """Attention of text rows to some columns of a longer row, ``[B, H, T, V]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, heads, rows, columns + 3, generator=generator, dtype=dtype).mul(2).softmax(3)[..., :columns]


def whole(attention):
    samples, _, rows, columns = attention.shape
    return torch.ones(samples, rows, dtype=torch.bool), torch.ones(samples, columns, dtype=torch.bool)


def distance_of(student, teacher, kind, masks=None, **kwargs):
    return attention_distance(student, teacher, *(masks or whole(student)), kind, **{"relative_to_uniform": False, **kwargs})


# --- distances ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", DISTANCES)
def test_a_distance_is_zero_for_equal_attention_and_positive_for_other(kind, dtype):
    one, other = maps(0, dtype=dtype), maps(1, dtype=dtype)
    student = one.clone().requires_grad_()
    same = distance_of(student, one, kind)
    same.sum().backward()
    torch.testing.assert_close(same, torch.zeros_like(same), rtol=0, atol=1e-6)
    torch.testing.assert_close(student.grad, torch.zeros_like(student), rtol=0, atol=1e-6)
    assert (distance_of(one, other, kind) > 1e-4).all()


@pytest.mark.parametrize("kind", DISTANCES)
def test_the_gradient_of_a_distance_is_right_for_student_and_mapped_teacher(kind):
    student, teacher = maps(2).requires_grad_(), maps(3).requires_grad_()
    masks = torch.tensor([[True, True, False, True], [True] * 4]), torch.tensor([[True] * 6, [True] * 5 + [False]])
    assert torch.autograd.gradcheck(lambda s, t: distance_of(s, t, kind, masks, relative_to_uniform=True), (student, teacher))


def by_hand(student, teacher, rows, columns, kind):
    """One sample's distance, number by number."""
    values = []
    for h in range(student.shape[0]):
        for t in (t for t, chosen in enumerate(rows) if chosen):
            s_row = [float(student[h, t, v]) for v, shown in enumerate(columns) if shown]
            t_row = [float(teacher[h, t, v]) for v, shown in enumerate(columns) if shown]
            if kind == "kl":
                q, p = [x / sum(s_row) for x in s_row], [x / sum(t_row) for x in t_row]
                values.append(sum(x * math.log(x / y) for x, y in zip(p, q, strict=True) if x > 0))
            else:
                product = sum(x * y for x, y in zip(s_row, t_row, strict=True))
                lengths = math.sqrt(sum(x * x for x in s_row)) * math.sqrt(sum(x * x for x in t_row))
                values.append(1 - product / lengths)
    return sum(values) / len(values) if values else 0.0


MASK = st.lists(st.booleans(), min_size=4, max_size=4)


@settings(max_examples=40)
@given(st.lists(MASK, min_size=2, max_size=2), st.integers(0, 999), st.sampled_from(["kl", "cosine"]))
def test_kl_and_cosine_are_what_a_loop_over_chosen_rows_gives(rows, seed, kind):
    student, teacher = maps(seed), maps(seed + 1)
    columns = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    found = distance_of(student, teacher, kind, (torch.tensor(rows), columns))
    expected = [by_hand(student[i], teacher[i], rows[i], columns[i].tolist(), kind) for i in range(2)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["kl", "cosine"])
@pytest.mark.parametrize("size", [1e-3, 1e-12])
def test_kl_and_cosine_compare_where_a_row_looks_and_not_how_much_of_it(kind, size):
    student, teacher = maps(4, dtype=torch.float32), maps(5, dtype=torch.float32)
    expected = distance_of(student, teacher, kind)
    torch.testing.assert_close(distance_of(student * size, teacher, kind), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(distance_of(student, teacher * size, kind), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(distance_of(student, teacher, kind, relative_to_uniform=True), expected)


@pytest.mark.parametrize("kind", ["kl", "cosine"])
def test_a_teachers_row_without_any_attention_to_the_image_says_nothing(kind):
    student, teacher = maps(6, dtype=torch.float32).requires_grad_(), maps(7, dtype=torch.float32)
    teacher[:, :, 2] = 0
    found = distance_of(student, teacher, kind)
    found.sum().backward()
    assert found.isfinite().all()
    assert (student.grad[:, :, 2] == 0).all()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["kl", "cosine"])
@pytest.mark.parametrize("tiny_value", [0.0, 1e-40, 1e-35])
def test_probabilities_that_underflow_leave_loss_and_gradient_finite(kind, tiny_value):
    student, teacher = maps(8, dtype=torch.float32), maps(9, dtype=torch.float32)
    student[:, :, 1] = tiny_value
    student[:, :, 2, 0], teacher[:, :, 3, 1] = tiny_value, tiny_value
    student.requires_grad_()
    found = distance_of(student, teacher, kind)
    (10 * found.sum()).backward()
    assert (found > 0).all()
    assert found.isfinite().all()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("rows", ["text", "answer", "instruction"])
@pytest.mark.parametrize("kind", DISTANCES)
def test_a_distance_does_not_depend_on_padding_or_neighbours(tiny, kind, rows):
    samples = mixture(tiny)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        together = batch_of(tiny, samples)
        attention = capture(tiny, together).attention[0]
        teacher = attention * torch.rand(attention.shape, generator=generator)
        found = distance_of(attention, teacher, kind, (chosen_rows(together, rows), together.vision_mask_BV))
        for i, one in enumerate(samples):
            alone = batch_of(tiny, [one])
            shape = alone.text_rows_BT.shape[1], alone.vision_columns_BV.shape[1]
            cut = [x[i : i + 1, :, : shape[0], : shape[1]] for x in (attention, teacher)]
            expected = distance_of(*cut, kind, (chosen_rows(alone, rows), alone.vision_mask_BV))
            torch.testing.assert_close(found[i], expected[0], rtol=1e-4, atol=1e-6)
    assert found.isfinite().all()
    assert found[2] == 0  # it has no image


# --- rows --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_vlm(tiny_folder):
    return load_vlm(tiny_folder)


@given(st.lists(st.tuples(st.one_of(st.integers(3, 500), st.just(IMAGE)), st.booleans()), min_size=1, max_size=9))
def test_answer_rows_predict_a_supervised_token_and_instruction_rows_are_the_others(tiny_vlm, tokens):
    ids = [1, *(token for token, _ in tokens)]
    one = sample(tiny_vlm, ids, answers=0)
    labels = [IGNORE, *(token if wanted and token != IMAGE else IGNORE for token, wanted in tokens)]
    one = replace(one, labels=torch.tensor(labels).numpy())
    batch = batch_of(tiny_vlm, [one, sample(tiny_vlm, [1, IMAGE, 5, 6, 7], answers=2)])
    long_ids, long_labels = [], []
    for token, label in zip(ids, labels, strict=True):
        repeats = 4 if token == IMAGE else 1
        long_ids += [token] * repeats
        long_labels += [label] * repeats
    first = long_ids.index(IMAGE) if IMAGE in long_ids else len(long_ids)
    text = [i for i, token in enumerate(long_ids) if token != IMAGE and i > first]
    predicting = [i for i in text if i + 1 < len(long_ids) and long_labels[i + 1] != IGNORE]
    for rows, expected in (("text", text), ("answer", predicting), ("instruction", [i for i in text if i not in predicting])):
        assert batch.text_rows_BT[0][chosen_rows(batch, rows)[0]].tolist() == expected
    # The other sample has rows 5, 6, 7 after four vision tokens: those before 6 and 7 predict.
    assert batch.text_rows_BT[1][chosen_rows(batch, "answer")[1]].tolist() == [5, 6]
