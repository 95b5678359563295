"""The terms of the objective and the sparse targets: exact where they say so, bounded where they say so."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exact_logits import reverse_kl, topk_targets
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkd.losses import terms as losses
from alignkd.losses.terms import focus_mask
from alignkd.targets.batch_targets import Targets
from alignkd.targets.logits.kept import renormalise

torch.manual_seed(0)


def dense_reverse_kl(student, teacher, temperature=1.0):
    """sum q (log q - log p) over the whole vocabulary, in float64."""
    q, p = (student.double() / temperature).log_softmax(1), (teacher.double() / temperature).log_softmax(1)
    return (q.exp() * (q - p)).sum(1)


def logits(answers, vocabulary, seed, scale=3.0, dtype=torch.float32):
    return (
        torch.randn(answers, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        .mul(scale)
        .to(dtype)
    )


SIZES = {
    "vocabulary": st.integers(2, 40),
    "seed": st.integers(0, 10**6),
    "scale": st.floats(0.01, 30),
    "temperature": st.sampled_from([0.5, 1.0, 2.0]),
}


# --- reverse KL and its targets ----------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(**SIZES)
def test_with_the_whole_vocabulary_reverse_kl_is_the_dense_one(vocabulary, seed, scale, temperature):
    student, teacher = logits(5, vocabulary, seed, scale, torch.float64), logits(5, vocabulary, seed + 1, scale, torch.float64)
    found = reverse_kl(student, *topk_targets(teacher, vocabulary, temperature), temperature)
    torch.testing.assert_close(found, dense_reverse_kl(student, teacher, temperature), rtol=1e-6, atol=1e-6)


@settings(max_examples=40)
@given(vocabulary=SIZES["vocabulary"], seed=SIZES["seed"])
def test_with_the_whole_vocabulary_reverse_kl_is_the_dense_one_in_single_precision(vocabulary, seed):
    student, teacher = logits(5, vocabulary, seed, 1.0), logits(5, vocabulary, seed + 1, 1.0)
    found = reverse_kl(student, *topk_targets(teacher, vocabulary))
    torch.testing.assert_close(found.double(), dense_reverse_kl(student, teacher), rtol=1e-5, atol=1e-6)


@settings(max_examples=60)
@given(**SIZES, data=st.data())
def test_with_fewer_tokens_reverse_kl_is_a_lower_bound_of_the_dense_one_and_never_negative(
    vocabulary, seed, scale, temperature, data
):
    k = data.draw(st.integers(1, vocabulary))
    student, teacher = logits(5, vocabulary, seed, scale, torch.float64), logits(5, vocabulary, seed + 1, scale, torch.float64)
    found = reverse_kl(student, *topk_targets(teacher, k, temperature), temperature)
    dense = dense_reverse_kl(student, teacher, temperature)
    assert (found <= dense + 1e-9 * dense.clamp(min=1)).all()
    assert (found >= -1e-9).all()


@settings(max_examples=20)
@given(seed=SIZES["seed"])
def test_more_tokens_bring_reverse_kl_closer_to_the_dense_one(seed):
    student, teacher = logits(4, 20, seed, dtype=torch.float64), logits(4, 20, seed + 1, dtype=torch.float64)
    values = torch.stack([reverse_kl(student, *topk_targets(teacher, k)) for k in (1, 2, 5, 10, 19, 20)])
    assert (values.diff(dim=0) >= -1e-9).all()


@settings(max_examples=60)
@given(**SIZES, data=st.data())
def test_rounding_to_half_precision_and_renormalising_never_makes_reverse_kl_negative(
    vocabulary, seed, scale, temperature, data
):
    k = data.draw(st.integers(1, max(1, vocabulary - 1)))
    teacher = logits(6, vocabulary, seed, scale)
    ids, logprobs, tail = topk_targets(teacher, k, temperature)
    rounded = renormalise(logprobs.half().float(), tail.half().float())
    total = rounded[0].exp().sum(1) + rounded[1].exp()
    torch.testing.assert_close(total, torch.ones(6), rtol=0, atol=1e-5)
    # A student equal to the teacher is where rounding shows most: its divergence is zero but for rounding.
    for student in (teacher, logits(6, vocabulary, seed + 1, scale)):
        found = reverse_kl(student.double(), ids, rounded[0].double(), rounded[1].double(), temperature)
        assert (found >= -1e-5).all()
        assert found.isfinite().all()


def test_a_student_equal_to_the_teacher_has_no_divergence_and_no_gradient():
    teacher = logits(4, 30, 1, dtype=torch.float64)
    student = teacher.clone().requires_grad_()
    value = reverse_kl(student, *topk_targets(teacher, 5))
    value.sum().backward()
    torch.testing.assert_close(value, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(student.grad, torch.zeros_like(student), rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [1, 4, 10])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_gradient_of_reverse_kl_is_right(k, temperature):
    student = logits(3, 10, 5, dtype=torch.float64).requires_grad_()
    targets = topk_targets(logits(3, 10, 6, dtype=torch.float64), k, temperature)
    assert torch.autograd.gradcheck(lambda x: reverse_kl(x, *targets, temperature), student)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_compared_in_single_precision(dtype):
    student, teacher = logits(4, 50, 1).to(dtype), logits(4, 50, 2).to(dtype)
    targets = topk_targets(teacher, 8)
    assert targets[1].dtype == targets[2].dtype == torch.float32
    found = reverse_kl(student, *targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, reverse_kl(student.float(), *topk_targets(teacher.float(), 8)), rtol=0, atol=0)


@settings(max_examples=60)
@given(**SIZES, data=st.data())
def test_top_k_targets_are_the_likeliest_tokens_their_log_probabilities_and_the_rest(
    vocabulary, seed, scale, temperature, data
):
    k = data.draw(st.integers(1, vocabulary + 3))
    teacher = logits(4, vocabulary, seed, scale)
    ids, logprobs, tail = topk_targets(teacher, k, temperature)
    dense = (teacher.double() / temperature).log_softmax(1)
    kept = min(k, vocabulary)
    assert ids.dtype == torch.int64
    assert ids.shape == logprobs.shape == (4, kept)
    assert all(len(set(row)) == kept for row in ids.tolist())
    torch.testing.assert_close(logprobs.double(), dense.sort(1, descending=True).values[:, :kept], rtol=1e-5, atol=1e-4)
    expected = dense.scatter(1, ids, -torch.inf).logsumexp(1)
    torch.testing.assert_close(tail.double(), expected, rtol=1e-5, atol=1e-4)
    assert (tail == -torch.inf).all() == (kept == vocabulary)


def test_a_tail_too_small_for_one_minus_the_kept_mass_is_still_right():
    teacher = torch.tensor([[40.0, 0.0, 0.0, 0.0]])
    _, _, tail = topk_targets(teacher, 1)
    assert tail.item() == pytest.approx(np.log(3.0) - 40, abs=1e-4)


@given(seed=SIZES["seed"])
def test_renormalising_targets_that_sum_to_one_leaves_them_as_they_are(seed):
    _, logprobs, tail = topk_targets(logits(4, 20, seed, dtype=torch.float64), 6)
    for found, expected in zip(renormalise(logprobs, tail), (logprobs, tail), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_targets_move_as_one_and_keep_what_is_absent_absent():
    moved = Targets(vision_BVD=torch.ones(1, 2, 3)).to("cpu")
    assert moved.attention == {}
    assert torch.equal(moved.vision_BVD, torch.ones(1, 2, 3))


# --- attention and vision terms ----------------------------------------------------------------------------------------


def masks(text, vision):
    """Masks of samples with so many text rows and vision tokens each."""
    T, V = max(text), max(vision)
    return (
        torch.tensor([[i < n for i in range(T)] for n in text], dtype=torch.bool).reshape(len(text), T),
        torch.tensor([[i < n for i in range(V)] for n in vision], dtype=torch.bool).reshape(len(vision), V),
    )


def random_attention(B, H, T, V, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(B, H, T, V, generator=generator, dtype=dtype) / V


def attention_loss(student, teacher, text, vision, **settings):
    """The mean over samples that have text and an image."""
    values = losses.attention_loss(student, teacher, text, vision, **settings)
    counted = text.any(1) & vision.any(1)
    assert (values[~counted] == 0).all()
    return values.sum() / max(int(counted.sum()), 1)


def vision_loss(student, teacher, chosen, vision, **settings):
    """The mean over samples that have an image."""
    values = losses.vision_loss(student, teacher, chosen, vision, **settings)
    assert (values[~vision.any(1)] == 0).all()
    return values.sum() / max(int(chosen.any(1).sum()), 1)


def random_tokens(B, V, D, seed=0, dtype=torch.float64):
    return torch.randn(B, V, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("relative", [False, True])
def test_attention_loss_is_the_mean_squared_error_of_each_sample_averaged(relative):
    text, vision = masks([3, 5, 2], [4, 2, 6])
    student, teacher = random_attention(3, 2, 5, 6, 1), random_attention(3, 2, 5, 6, 2)
    expected = []
    for b, (t, v) in enumerate(((3, 4), (5, 2), (2, 6))):
        error = (student[b, :, :t, :v] - teacher[b, :, :t, :v]).square().mean().item()
        expected.append(error * v**2 if relative else error)
    found = attention_loss(student, teacher, text, vision, relative_to_uniform=relative)
    assert found.item() == pytest.approx(np.mean(expected), rel=1e-5)


def test_attention_relative_to_uniform_does_not_depend_on_the_number_of_vision_tokens():
    values = []
    for V in (4, 64):
        text, vision = masks([3], [V])
        uniform = torch.full((1, 2, 3, V), 1 / V)
        values.append(attention_loss(uniform * 1.5, uniform, text, vision, relative_to_uniform=True).item())
    assert values == pytest.approx([0.25, 0.25])


@pytest.mark.parametrize("relative", [False, True])
def test_vision_loss_is_the_mean_squared_error_of_the_chosen_tokens_averaged(relative):
    _, vision = masks([1, 1], [5, 3])
    chosen = torch.tensor([[True, False, True, False, False], [False, True, False, False, False]])
    student, teacher = random_tokens(2, 5, 4, 1), random_tokens(2, 5, 4, 2)
    expected = []
    for b, v in enumerate((5, 3)):
        error = (student[b, chosen[b]] - teacher[b, chosen[b]]).square().mean()
        expected.append((error / teacher[b, :v].var(unbiased=False) if relative else error).item())
    found = vision_loss(student, teacher, chosen, vision, relative_to_variance=relative)
    assert found.item() == pytest.approx(np.mean(expected), rel=1e-5)


def test_the_best_constant_has_a_relative_vision_loss_of_one():
    _, vision = masks([1], [50])
    teacher = random_tokens(1, 50, 8) * 7 + 3
    constant = teacher.mean().expand_as(teacher)
    assert vision_loss(constant, teacher, vision, vision, relative_to_variance=True).item() == pytest.approx(1, rel=1e-5)


def test_a_teacher_without_variance_gives_no_infinity():
    _, vision = masks([1], [3])
    teacher = torch.ones(1, 3, 4)
    assert vision_loss(teacher, teacher, vision, vision, relative_to_variance=True).item() == 0


@pytest.mark.parametrize("relative", [False, True])
def test_the_gradients_of_attention_and_vision_loss_are_right(relative):
    # In steps fit for single precision, in which both losses are computed.
    text, vision = masks([2, 3], [3, 2])
    settings_ = {"eps": 1e-2, "atol": 1e-2, "rtol": 1e-2}
    student, teacher = random_attention(2, 2, 3, 3, 1).requires_grad_(), random_attention(2, 2, 3, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s, t: attention_loss(s, t, text, vision, relative_to_uniform=relative), (student, teacher), **settings_
    )
    student, teacher = random_tokens(2, 3, 2, 1).requires_grad_(), random_tokens(2, 3, 2, 2)
    assert torch.autograd.gradcheck(
        lambda s: vision_loss(s, teacher, vision, vision, relative_to_variance=relative), (student,), **settings_
    )


def test_the_gradient_of_attention_loss_is_the_formula():
    text, vision = masks([2, 3], [3, 2])
    student, teacher = random_attention(2, 2, 3, 3, 1).requires_grad_(), random_attention(2, 2, 3, 3, 2)
    attention_loss(student, teacher, text, vision, relative_to_uniform=True).backward()
    real = (text[:, :, None] & vision[:, None, :])[:, None]
    scale = torch.tensor([3**2 / (2 * 3), 2**2 / (3 * 2)])[:, None, None, None]
    expected = (2 * (student - teacher) * real * scale / 2 / 2).detach()  # 2 heads, 2 samples
    torch.testing.assert_close(student.grad, expected, rtol=1e-5, atol=1e-7)


def terms(attention, tokens, text, vision, k=2):
    """Every alignment term, as ``(student, teacher)`` pairs go in."""
    focus = focus_mask(attention[1], vision, k)
    return torch.stack(
        [attention_loss(*attention, text, vision, relative_to_uniform=r) for r in (False, True)]
        + [vision_loss(*tokens, m, vision, relative_to_variance=r) for r in (False, True) for m in (vision, focus)]
    )


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 6)), min_size=1, max_size=4),
    st.integers(0, 3),
    st.integers(0, 3),
    st.integers(0, 99),
)
def test_padding_changes_no_term_whatever_it_holds(sizes, more_text, more_vision, seed):
    text, vision = masks([t for t, _ in sizes], [v for _, v in sizes])
    B, T, V = len(sizes), text.shape[1], vision.shape[1]
    attention = [random_attention(B, 2, T, max(V, 1), seed + i)[..., :V] for i in (1, 2)]
    tokens = [random_tokens(B, V, 3, seed + i) for i in (1, 2)]
    real = (text[:, :, None] & vision[:, None, :])[:, None]
    attention = [a * real for a in attention]
    tokens = [x * vision[:, :, None] for x in tokens]
    expected = terms(attention, tokens, text, vision)

    def pad(x, *amounts):
        return torch.nn.functional.pad(x, amounts)

    wide_text, wide_vision = pad(text, 0, more_text), pad(vision, 0, more_vision)
    wide_attention = [pad(a, 0, more_vision, 0, more_text) for a in attention]
    wide_tokens = [pad(x, 0, 0, 0, more_vision) for x in tokens]
    torch.testing.assert_close(terms(wide_attention, wide_tokens, wide_text, wide_vision), expected)
    # Rubbish in the padding of student and teacher: the losses mask it themselves. (The focus looks at real text rows only
    # through the attention's own zeros, so the teacher's attention is left as captured.)
    wide_real = (wide_text[:, :, None] & wide_vision[:, None, :])[:, None]
    wide_attention[0] = torch.where(wide_real, wide_attention[0], torch.tensor(7.0, dtype=torch.float64))
    wide_tokens = [torch.where(wide_vision[:, :, None], x, torch.tensor(5.0, dtype=torch.float64)) for x in wide_tokens]
    torch.testing.assert_close(terms(wide_attention, wide_tokens, wide_text, wide_vision), expected)


def test_the_loss_of_a_sample_does_not_depend_on_its_neighbours():
    text, vision = masks([3, 5, 2, 4], [4, 2, 0, 6])
    attention = [random_attention(4, 2, 5, 6, i) for i in (1, 2)]
    tokens = [random_tokens(4, 6, 3, i) for i in (1, 2)]
    together = terms(attention, tokens, text, vision)
    alone = [terms([a[[i]] for a in attention], [x[[i]] for x in tokens], text[[i]], vision[[i]]) for i in (0, 1, 3)]
    torch.testing.assert_close(together, torch.stack(alone).mean(0))


def test_no_image_gives_zero_losses_and_finite_gradients():
    for vision_tokens in (0, 3):
        text, _ = masks([3, 2], [1, 1])
        vision = torch.zeros(2, vision_tokens, dtype=torch.bool)
        student_attention = torch.zeros(2, 2, 3, vision_tokens, requires_grad=True)
        student_tokens = torch.zeros(2, vision_tokens, 4, requires_grad=True)
        values = terms(
            [student_attention, torch.zeros(2, 2, 3, vision_tokens)],
            [student_tokens, torch.zeros(2, vision_tokens, 4)],
            text,
            vision,
        )
        values.sum().backward()
        assert (values == 0).all()
        for leaf in (student_attention, student_tokens):
            assert (leaf.grad == 0).all()


# --- focus -------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 8), st.integers(1, 10), st.integers(0, 99))
def test_the_focus_is_on_the_tokens_the_teacher_attends_to_most(V, k, seed):
    _, vision = masks([4], [V])
    attention = random_attention(1, 3, 4, V, seed)
    chosen = focus_mask(attention, vision, k)[0]
    assert chosen.sum() == min(k, V)
    score = torch.stack([sum(attention[0, :, t, v].mean() for t in range(4)) for v in range(V)])
    if 0 < chosen.sum() < V:
        assert score[chosen].min() >= score[~chosen].max()


def test_the_focus_never_falls_on_padding_and_takes_all_tokens_of_a_small_sample():
    _, vision = masks([2, 2, 2], [5, 2, 0])
    attention = random_attention(3, 2, 2, 5)
    attention[1, :, :, 2:] = 9.0
    chosen = focus_mask(attention, vision, 3)
    assert chosen.sum(1).tolist() == [3, 2, 0]
    assert not (chosen & ~vision).any()


def test_the_focus_takes_the_head_mean_of_a_teacher_as_it_takes_all_heads():
    _, vision = masks([4], [7])
    attention = random_attention(1, 4, 4, 7)
    assert torch.equal(focus_mask(attention, vision, 3), focus_mask(attention.mean(1, keepdim=True), vision, 3))
