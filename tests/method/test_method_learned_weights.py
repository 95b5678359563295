"""The learned weights of terms (beta-kd): their loss, their gradients, and how they are saved."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from exact_logits import ExactTopK, shape_of, targets_of
from tiny_models import batch_of, mixture

from alignkd.inputs.batch import Counts
from alignkd.losses.learned_weights import LearnedWeights, learned_part
from alignkd.losses.recipes import RECIPES, one_term_recipes, term_weights
from alignkd.objective import Objective

# --- learned weights ---------------------------------------------------------------------------------------------------

BETA = RECIPES["beta-kd"]


def learned(tiny, deep, recipe=BETA, raw=None):
    torch.manual_seed(0)
    objective = Objective(tiny, recipe, shape_of(deep), logit_codec=ExactTopK())
    if raw is not None:
        with torch.no_grad():
            objective.learned_weights.log_variances.copy_(torch.tensor(raw))
    return objective


def test_learned_weights_begin_as_the_recipe_itself(tiny, deep):
    batch = batch_of(tiny, mixture(tiny))
    targets = targets_of(deep, batch)
    fixed = learned(tiny, deep, replace(BETA, weighting="fixed"))(batch, targets)
    found = learned(tiny, deep)(batch, targets)
    torch.testing.assert_close(found["loss"], fixed["loss"])
    assert set(found["precisions"]) == set(found["terms"])
    assert all(precision == 1 for precision in found["precisions"].values())
    assert fixed["precisions"] == {}


def test_loss_and_every_gradient_are_those_of_the_formula(tiny, deep):
    batch = batch_of(tiny, mixture(tiny))
    targets = targets_of(deep, batch)
    objective = learned(tiny, deep, raw=[0.4, -0.7, 1.1, -0.2])
    weights = term_weights(BETA)
    found = objective(batch, targets)
    parameters = [p for p in objective.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(found["loss"], parameters, allow_unused=True)
    # The formula in plain autograd: each term alone, times its precision.
    precisions_K, log_variances_K = objective.learned_weights()
    assert objective.learned_weights.groups == ("supervised", "reverse_kl", "attention", "vision")
    fixed = replace(BETA, weighting="fixed")
    reference = learned(tiny, deep, fixed)
    terms = {}
    for name, alone in one_term_recipes(fixed).items():
        terms[name] = reference(batch, targets, recipe=alone)["loss"]
    expected = log_variances_K.sum()
    for group, precision in zip(objective.learned_weights.groups, precisions_K, strict=True):
        expected = expected + precision * sum(terms[name] for name in terms if name.startswith(group))
    torch.testing.assert_close(found["loss"], expected, rtol=1e-5, atol=1e-5)
    own = dict(objective.named_parameters())
    other = dict(reference.named_parameters())
    # The adapters of the two begin alike; the student is the same.
    wanted = [other.get(name, p) for name, p in own.items() if p.requires_grad]
    for got, want in zip(gradients, torch.autograd.grad(expected, wanted, allow_unused=True), strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
    assert sum(weights.values()) > 0


def test_of_a_step_in_parts_the_penalty_is_counted_once(tiny, deep):
    samples = mixture(tiny)
    parts = [batch_of(tiny, samples[:2]), batch_of(tiny, samples[2:])]
    together = batch_of(tiny, samples)
    counts = [part.counts() for part in parts]
    names = ("answers", "with_text_after_image", "with_image", "samples")
    step = Counts(**{name: sum(getattr(c, name) for c in counts) for name in names})
    objective = learned(tiny, deep, raw=[0.4, -0.7, 1.1, -0.2])
    whole_loss = objective(together, targets_of(deep, together))["loss"]
    in_parts = [objective(part, targets_of(deep, part), step)["loss"] for part in parts]
    torch.testing.assert_close(sum(in_parts), whole_loss, rtol=1e-5, atol=1e-5)
    raw = objective.learned_weights.log_variances
    (gradient,) = torch.autograd.grad(whole_loss, raw)
    (of_parts,) = torch.autograd.grad(sum(in_parts), raw)
    torch.testing.assert_close(of_parts, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [0.02, 1.0, 40.0])
def test_no_precision_goes_to_zero_for_free_and_each_finds_the_inverse_of_its_term(size):
    weights = LearnedWeights(["supervised", "attention"])
    terms = {"supervised": torch.tensor(size), "attention": torch.tensor(1.0)}
    optimizer = torch.optim.Adam(weights.parameters(), lr=0.3)
    for _ in range(400):
        optimizer.zero_grad()
        precisions_K, log_variances_K = weights()
        learned_part(weights.of_terms(precisions_K, terms), terms, log_variances_K.sum()).backward()
        optimizer.step()
    precisions = weights.of_terms(weights()[0], terms)
    assert precisions["supervised"].item() == pytest.approx(1 / size, rel=0.02)
    assert precisions["attention"].item() == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("raw", [-1e3, 1e3])
def test_a_precision_stays_positive_and_bounded_and_can_always_come_back(raw):
    weights = LearnedWeights(["supervised"])
    weights.log_variances.data.fill_(raw)
    (precision,) = weights()[0].tolist()
    assert math.exp(-5.01) < precision < math.exp(5.01)
    weights.log_variances.data.fill_(math.copysign(8.0, raw))
    weights()[0].sum().backward()
    assert weights.log_variances.grad.abs().item() > 1e-4


def test_gradient_norms_of_single_terms_carry_their_precision_and_not_the_penalty(tiny, deep):
    batch = batch_of(tiny, mixture(tiny))
    targets = targets_of(deep, batch)
    objective = learned(tiny, deep, raw=[0.0, 0.0, -1.0, 0.0])
    alone = one_term_recipes(BETA)["attention"]
    outcome = objective(batch, targets, recipe=alone)
    precision = math.exp(5 * math.tanh(1 / 5))
    torch.testing.assert_close(outcome["loss"], BETA.attention * precision * outcome["terms"]["attention"])
    assert torch.autograd.grad(outcome["loss"], objective.learned_weights.log_variances, allow_unused=True) == (None,)


def test_learned_weights_are_saved_with_the_objective(tiny, deep):
    names = set(learned(tiny, deep).state_dict())
    assert {name for name in names if "learned" in name} == {"learned_weights.log_variances"}
    assert not any("learned" in name for name in learned(tiny, deep, RECIPES["align-kd"]).state_dict())
