"""The optimizers of stage two, and which parameters have a learning rate of their own."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

from alignkd.objective import Objective
from alignkd.pipeline.config.distill import OptimizerName


@dataclass(frozen=True)
class OptimizerSettings:
    """Which optimizer, and the learning rates beside the run's own; the projector's is None where it has no other."""

    name: OptimizerName
    muon_learning_rate: float
    projector_learning_rate: float | None


def optimizer_of(
    objective: Objective, settings: OptimizerSettings, *, learning_rate: float, weight_decay: float, fused: bool
) -> torch.optim.Optimizer:
    """An optimizer of everything that trains: the student without its tower, the adapters, and learned weights of terms."""
    projector_ids = set(map(id, objective.vlm.projector.parameters()))
    learned = objective.learned_weights
    learned_ids = set() if learned is None else set(map(id, learned.parameters()))
    projector_rate = settings.projector_learning_rate
    own_rates = {} if projector_rate is None else dict.fromkeys(projector_ids, projector_rate)
    return make_optimizer(
        settings.name,
        objective.named_parameters(),
        learning_rate=learning_rate,
        muon_learning_rate=settings.muon_learning_rate,
        weight_decay=weight_decay,
        own_rates=own_rates | dict.fromkeys(learned_ids, objective.recipe.weighting_learning_rate),
        undecayed=learned_ids,
        fused=fused,
    )


def make_optimizer(
    name: OptimizerName,
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    learning_rate: float,
    weight_decay: float,
    muon_learning_rate: float,
    own_rates: dict[int, float],
    undecayed: Collection[int] = (),
    fused: bool,
) -> torch.optim.Optimizer:
    """AdamW over named parameters; or Muon for the matrices of the layers, and AdamW for the rest.

    Both by the ``id`` of a parameter: ``own_rates`` gives it a learning rate of its own (under AdamW), ``undecayed`` no
    weight decay.
    """
    named = [(key, p) for key, p in parameters if p.requires_grad]
    matrices = [p for key, p in named if name == "muon" and p.ndim == 2 and ".layers." in f".{key}" and id(p) not in own_rates]
    taken = {id(p) for p in matrices}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {(learning_rate, weight_decay): []}
    for _, p in named:
        if id(p) not in taken:
            settings = own_rates.get(id(p), learning_rate), 0.0 if id(p) in undecayed else weight_decay
            groups.setdefault(settings, []).append(p)
    adamw = torch.optim.AdamW(
        [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()],
        lr=learning_rate,
        weight_decay=weight_decay,
        fused=fused,
    )
    if not matrices:
        return adamw
    return ChainedOptimizer(torch.optim.Muon(matrices, lr=muon_learning_rate, weight_decay=weight_decay), adamw)


class ChainedOptimizer(torch.optim.Optimizer):
    """Several optimizers as one: a scheduler sees all parameter groups, a checkpoint holds all states."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        super().__init__([{"params": group["params"]} for part in parts for group in part.param_groups], {})
        self.parts = parts
        self._share_groups()

    def _share_groups(self) -> None:
        # The same dictionaries, not copies: a scheduler writes learning rates into them.
        self.param_groups = list(chain.from_iterable(part.param_groups for part in self.parts))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of each."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of the parts, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()
