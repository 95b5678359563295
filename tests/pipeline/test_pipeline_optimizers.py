from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from alignkd.pipeline.training.optimizers import ChainedOptimizer, make_optimizer


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.projector = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return self.projector(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Small()


def build(model, name, own_rates=None):
    return make_optimizer(
        name,
        model.named_parameters(),
        learning_rate=1e-2,
        weight_decay=0.0,
        muon_learning_rate=3e-2,
        own_rates=own_rates or {},
        fused=False,
    )


def train(model, optimizer, scheduler, steps):
    x = torch.linspace(-1, 1, 24).view(4, 6)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        scheduler.step()


def halving(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_trained_parameter_is_in_one_group(model, name):
    model.layers[0].weight.requires_grad_(False)
    grouped = [id(p) for group in build(model, name).param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_parameter_with_its_own_rate_gets_it(model, name):
    mine = {id(p): 5e-4 for p in model.projector.parameters()}
    for group in build(model, name, mine).param_groups:
        assert all((group["lr"] == 5e-4) == (id(p) in mine) for p in group["params"])


def test_muon_takes_the_matrices_of_layers_alone(model):
    muon, adamw = build(model, "muon").parts
    assert [id(p) for g in muon.param_groups for p in g["params"]] == [id(layer.weight) for layer in model.layers]
    assert isinstance(adamw, torch.optim.AdamW)


def test_a_scheduler_moves_the_rates_of_all_parts(model):
    optimizer = build(model, "muon")
    train(model, optimizer, halving(optimizer), 1)
    assert [group["lr"] for part in optimizer.parts for group in part.param_groups] == [1.5e-2, 5e-3]


def test_going_on_from_a_saved_state_equals_an_uninterrupted_run(model):
    optimizer = build(model, "muon")
    scheduler = halving(optimizer)
    train(model, optimizer, scheduler, 3)
    again = copy.deepcopy(model)
    state = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    train(model, optimizer, scheduler, 3)

    resumed = build(again, "muon")
    later = halving(resumed)
    resumed.load_state_dict(state[0])
    later.load_state_dict(state[1])
    train(again, resumed, later, 3)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert isinstance(resumed, ChainedOptimizer)
    assert [group["lr"] for group in resumed.param_groups] == [group["lr"] for group in optimizer.param_groups]
