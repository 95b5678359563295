"""The norm of each term's gradient alone."""

from __future__ import annotations

import pytest
import torch
from exact_logits import ExactTopK, exact_answers
from tiny_models import batch_of, mixture
from torch import nn
from torch.utils.checkpoint import checkpoint

from alignkd.capture.attention import capture
from alignkd.losses.gradient_norms import term_gradient_norms
from alignkd.losses.recipes import RECIPES, one_term_recipes
from alignkd.objective import Objective, TeacherShape
from alignkd.targets.batch_targets import Targets


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared, self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 1), nn.Linear(3, 2)
        self.frozen = nn.Linear(3, 1).requires_grad_(False)

    def forward(self, x, *, recompute=False):
        hidden = checkpoint(self.shared, x, use_reentrant=False) if recompute else self.shared(x)
        hidden = self.frozen(hidden.tanh()) + hidden
        return {"first": self.first(hidden).square().mean(), "second": 3 * self.second(hidden).square().sum()}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def x():
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def by_backward(net, x, name):
    net.zero_grad()
    net(x)[name].backward()
    squares = [float(p.grad.double().square().sum()) for p in net.parameters() if p.grad is not None]
    net.zero_grad(set_to_none=True)
    return sum(squares) ** 0.5


@pytest.mark.parametrize("recompute", [False, True])
def test_norms_are_those_of_one_backward_pass_a_term(net, x, recompute):
    found = term_gradient_norms(net(x, recompute=recompute), net.parameters())
    assert list(found) == ["first", "second"]
    for name, norm in found.items():
        assert norm.item() == pytest.approx(by_backward(net, x, name), rel=1e-5)


def test_no_gradient_is_stored_and_one_that_was_is_left_as_it_was(net, x):
    net.shared.weight.grad = torch.full_like(net.shared.weight, 7.0)
    term_gradient_norms(net(x), net.parameters())
    assert (net.shared.weight.grad == 7).all()
    assert all(p.grad is None for p in net.parameters() if p is not net.shared.weight)


def test_no_hook_of_a_gradient_that_is_accumulated_fires(net, x):
    fired = []
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(fired.append)
    term_gradient_norms(net(x), net.parameters())
    assert fired == []


def test_terms_of_graphs_of_their_own_work_too(net, x):
    expected = term_gradient_norms(net(x), net.parameters())
    found = term_gradient_norms({name: net(x)[name] for name in expected}, net.parameters())
    assert {k: v.item() for k, v in found.items()} == pytest.approx({k: v.item() for k, v in expected.items()}, rel=1e-5)


def test_a_parameter_out_of_reach_counts_nothing_and_a_term_without_a_gradient_is_zero(net, x):
    alone = term_gradient_norms(
        {"first": net(x)["first"], "constant": torch.tensor(3.0)}, [net.first.weight, net.second.weight]
    )
    expected = term_gradient_norms({"a": net(x)["first"]}, [net.first.weight])["a"]
    assert alone["first"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert alone["constant"].item() == 0
    assert term_gradient_norms({"first": net(x)["first"]}, [net.second.weight])["first"].item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_of_gradients_of_16_bits_neither_overflow_nor_are_coarse(dtype):
    weight = nn.Parameter(torch.ones(100, dtype=dtype))
    norm = term_gradient_norms({"a": (weight * 20_000).sum()}, [weight])["a"]
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(float(torch.tensor(20_000).to(dtype)) * 10, rel=1e-5)


def test_norms_stay_on_the_device_of_the_parameters(net, x):
    # Tensors of the meta device have no values: whatever looks at one raises.
    norms = term_gradient_norms(net.to("meta")(x.to("meta")), net.parameters())
    assert {norm.device.type for norm in norms.values()} == {"meta"}


def test_gradients_of_recipes_of_one_term_add_up_to_that_of_the_whole(tiny):
    batch = batch_of(tiny, mixture(tiny))
    with torch.no_grad():
        captured = capture(tiny, batch)
        targets = Targets(
            {0: captured.attention[0] * 0.5}, captured.vision_BVD + 1, exact_answers(tiny, captured.hidden_AD * 0.5, 20)
        )
    recipe = RECIPES["align-kd"]
    objective = Objective(tiny, recipe, TeacherShape(tiny.heads, tiny.hidden_size), logit_codec=ExactTopK())
    parameters = [p for p in objective.parameters() if p.requires_grad]

    def flat_gradient(loss):
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return torch.cat(
            [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, found, strict=True)]
        )

    alone = one_term_recipes(recipe)
    gradients = {name: flat_gradient(objective(batch, targets, recipe=one)["loss"]) for name, one in alone.items()}
    whole = flat_gradient(objective(batch, targets)["loss"])
    torch.testing.assert_close(sum(gradients.values()), whole, rtol=1e-4, atol=1e-5 * whole.abs().max().item())
    norms = term_gradient_norms(
        {name: objective(batch, targets, recipe=one)["loss"] for name, one in alone.items()}, parameters
    )
    for name, norm in norms.items():
        assert norm.item() == pytest.approx(gradients[name].norm().item(), rel=1e-4)
        assert norm > 0
