"""Weights of answer tokens by advantage: the formula of VA-OPD by sample, whatever the batch, and its gradient."""

from __future__ import annotations

import math

import pytest
import torch
from exact_logits import ExactTopK
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkd.errors import ConfigError
from alignkd.losses.answer_loss import answer_terms
from alignkd.losses.recipes import RECIPES, get_recipe, one_term_recipes
from alignkd.losses.token_weights import token_weights

ADVANTAGES = st.lists(st.lists(st.sampled_from([0.0, 0.1, 0.5, 2.0, 7.0]), max_size=17), min_size=1, max_size=5)


def weights_of(samples, share=0.2, top=0.5):
    flat = torch.tensor([value for sample in samples for value in sample])
    owners = torch.tensor([i for i, sample in enumerate(samples) for _ in sample], dtype=torch.long)
    return token_weights(flat, owners, len(samples), top_share=share, top_weight=top)


def plain(losses, advantages, share, top):
    """``top * mean over the top share + (1 - top) * mean over the rest`` of one sample, with sorted lists."""
    if not any(advantages):
        return sum(losses) / len(losses)
    order = sorted(range(len(losses)), key=lambda i: (-advantages[i], i))
    k = max(1, math.floor(share * len(losses) + 1e-9))
    head, rest = ([losses[i] for i in part] for part in (order[:k], order[k:]))
    if not rest:
        return sum(head) / len(head)
    return top * sum(head) / len(head) + (1 - top) * sum(rest) / len(rest)


@settings(max_examples=200, deadline=None)
@given(samples=ADVANTAGES, share=st.sampled_from([0.2, 0.3, 0.05, 0.9]), top=st.sampled_from([0.5, 0.2, 0.0, 1.0]))
def test_the_weighted_mean_of_a_sample_is_the_formula_and_its_weights_have_a_mean_of_one(samples, share, top):
    weight_A, start = weights_of(samples, share, top), 0
    for sample in filter(None, samples):
        mine = weight_A[start : start + len(sample)].double()
        losses = [math.sin(3 * i) + 2 for i in range(len(sample))]
        expected = plain(losses, sample, share, top)
        assert float((mine * torch.tensor(losses, dtype=torch.float64)).mean()) == pytest.approx(expected, rel=1e-5)
        assert float(mine.mean()) == pytest.approx(1, rel=1e-5)
        start += len(sample)


@settings(max_examples=100, deadline=None)
@given(samples=ADVANTAGES)
def test_a_sample_has_the_same_weights_alone_and_in_any_batch(samples):
    alone = [weights_of([sample]) for sample in samples]
    assert torch.equal(weights_of(samples), torch.cat(alone))


@pytest.mark.parametrize(
    ("advantages", "expected"),
    [
        ([1.0], [1.0]),
        ([0.0, 3.0], [1.0, 1.0]),
        ([0.0, 0.0, 0.0, 2.0], [2 / 3, 2 / 3, 2 / 3, 2.0]),
        ([5.0, 5.0, 1.0], [1.5, 0.75, 0.75]),
        ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0]),
    ],
)
def test_short_samples_have_one_token_in_the_top_ties_go_to_the_first_and_no_advantage_means_the_plain_mean(
    advantages, expected
):
    torch.testing.assert_close(weights_of([advantages]), torch.tensor(expected))


class Case:
    """Six answers of three samples, whose teacher is known token by token."""

    def __init__(self, dtype=torch.float32):
        generator = torch.Generator().manual_seed(1)
        self.hidden = torch.randn(6, 8, generator=generator, dtype=dtype)
        self.head = torch.randn(20, 8, generator=generator, dtype=dtype)
        self.labels = torch.randint(0, 20, (6,), generator=generator)
        self.weights = torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0, 1.0])
        self.codec, logits = ExactTopK(), torch.randn(6, 20, generator=generator)
        self.values = self.codec.encode(self.hidden, logits, self.labels, torch.empty(6, 0))
        self.divergence = self.terms("reverse_kl", alone=True)

    def terms(self, name, *, alone=False, rows=slice(None), weights=None, hidden=None, head=None, divisor=6.0):
        wanted = {name: 0.7} if alone else {"supervised": 1.3, name: 0.7}
        return answer_terms(
            self.hidden[rows] if hidden is None else hidden,
            self.head if head is None else head,
            self.labels[rows],
            weights=wanted,
            codec=self.codec,
            values={key: value[rows] for key, value in self.values.items()},
            temperature=1.0,
            divisor=divisor,
            token_weights_A=weights,
        )


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jensen_shannon"])
def test_loss_and_gradient_are_those_of_each_answer_alone_times_its_weight_and_the_supervised_term_has_none(name):
    case = Case(torch.float64)
    leaves = [case.hidden.clone().requires_grad_(), case.head.clone().requires_grad_()]
    found = case.terms(name, weights=case.weights, hidden=leaves[0], head=leaves[1])
    found.loss.backward()
    expected, singles = [case.hidden.clone().requires_grad_(), case.head.clone().requires_grad_()], []
    for i, weight in enumerate(case.weights.tolist()):
        row = slice(i, i + 1)
        divergence = case.terms(name, alone=True, rows=row, hidden=expected[0][row], head=expected[1]).loss
        both = case.terms(name, rows=row, hidden=expected[0][row], head=expected[1]).loss
        again = case.terms(name, alone=True, rows=row, hidden=expected[0][row], head=expected[1]).loss
        singles.append(weight * divergence + both - again)
    total = torch.stack(singles).sum()
    total.backward()
    torch.testing.assert_close(found.loss, total)
    for leaf, other in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, other.grad)
    losses = case.terms(name).losses_TA
    torch.testing.assert_close(found.sums["supervised"], losses[0].sum())
    torch.testing.assert_close(found.sums[name], (losses[1] * case.weights).sum())


def test_weights_of_one_for_every_token_change_nothing():
    case = Case()
    leaves = [case.hidden.clone().requires_grad_() for _ in range(2)]
    losses = [case.terms("reverse_kl", weights=w, hidden=x).loss for w, x in zip([None, torch.ones(6)], leaves, strict=True)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


def test_a_recipe_that_weights_tokens_needs_the_advantage_and_a_term_to_weight():
    assert RECIPES["visual-advantage"].needs == {"logits", "advantage"}
    assert get_recipe("align-kd", {"token_weighting": "advantage"}).needs == {"attention", "vision", "logits", "advantage"}
    assert "advantage" not in RECIPES["align-kd"].needs
    alone = one_term_recipes(RECIPES["visual-advantage"])
    assert (alone["reverse_kl"].needs, alone["supervised"].needs) == ({"logits", "advantage"}, frozenset())
    with pytest.raises(ConfigError, match="all of them have weight 0"):
        get_recipe("sft", {"token_weighting": "advantage"})
