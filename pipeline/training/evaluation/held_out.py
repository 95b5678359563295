"""Held-out samples: every term of the recipe and the agreement with the teacher, as means over the whole set.

Each term is a sum over answers or samples, divided at the end by how many there were in all: the figures depend neither on
the batches nor on the number of processes. No process makes fewer forward passes than another, since ZeRO-3 gathers weights
in each.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from alignkd.capture.teacher import Teacher
from alignkd.errors import DataError
from alignkd.inputs.batch import Counts
from alignkd.losses.recipes import Recipe, term_weights
from alignkd.losses.term_registry import averaged_over
from alignkd.objective import Objective
from alignkd.pipeline.feeding.dataset import FailedSample, TrainingSet
from alignkd.pipeline.feeding.row_checks import MisalignedRowError
from alignkd.pipeline.runtime.processes import Processes

_ONE = Counts(answers=1, with_text_after_image=1, with_image=1, samples=1)
"""With these, the objective's terms are sums."""
_COUNTS = ("answers", "with_text_after_image", "with_image", "samples")
_COMPARED = ("agreeing", "compared")


class StoppedError(Exception):
    """A signal came in the middle of an evaluation."""


@dataclass
class HeldOut:
    """The held-out samples. ``recipe``: of which terms are measured. ``teachers``: whose targets the samples have, where they
    are not those of training; ``agreement``: whether these say what the teacher's likeliest tokens are.
    """

    data: TrainingSet
    recipe: Recipe
    teachers: tuple[Teacher, ...] | None
    agreement: bool
    batch_size: int
    batches: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        """Batches of samples whose records are of like size: less padding."""
        sizes = self.data.samples.sizes[self.data.indices]
        order = np.argsort(sizes, kind="stable").tolist()
        self.batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]

    @property
    def terms(self) -> list[str]:
        """The terms that are measured."""
        return [name for name, weight in term_weights(self.recipe).items() if weight > 0 or name == "supervised"]

    @torch.no_grad()
    def measure(self, model: Any, objective: Objective, processes: Processes, stops: Any) -> dict[str, float]:
        """The figures, by name. Every process calls it. ``model``: what training calls; ``stops``: whether a signal came.

        Raises:
            StoppedError: a signal came to some process.
            DataError: too many samples cannot be used.
            CacheError: a row does not belong to its sample.
        """
        sums, counts, factors = dict[str, torch.Tensor](), dict.fromkeys(_COUNTS, 0.0), dict[str, torch.Tensor]()
        with self._own_targets(objective), ThreadPoolExecutor(1, thread_name_prefix="held-out") as ahead:
            rounds = self._rounds(processes)
            waiting = ahead.submit(self._read, rounds[0][0])
            for i, (_, mine) in enumerate(rounds):
                inputs = waiting.result()
                if i + 1 < len(rounds):
                    waiting = ahead.submit(self._read, rounds[i + 1][0])
                self._agree(inputs["failures"] if mine else [], processes, stops)
                mine &= inputs["batch"] is not None
                inputs = inputs if inputs["batch"] is not None else self._first_usable()
                here = inputs["targets"].counts(inputs["batch"])
                device = objective.vlm.device
                outcome = model(
                    batch=inputs["batch"].to(device),
                    targets=inputs["targets"].to(device),
                    counts=_ONE,
                    recipe=self.recipe,
                    with_agreement=self.agreement,
                )
                factors = outcome["precisions"]
                if mine:
                    _add(sums, outcome)
                    counts = {name: counts[name] + getattr(here, name) for name in _COUNTS}
        return self._means(_on_host(sums), counts, _on_host(factors), processes)

    def _rounds(self, processes: Processes) -> list[tuple[list[int], bool]]:
        """Samples of each forward pass of this process, and whether they count: some are only there to match the others'."""
        world, n = processes.world_size, len(self.batches)
        places = range(processes.rank, -(-n // world) * world, world)
        return [(self.batches[place if place < n else 0], place < n) for place in places]

    def _read(self, samples: list[int]) -> Mapping[str, Any]:
        return self.data.collate(self.data.__getitems__(samples))

    def _first_usable(self) -> Mapping[str, Any]:
        for samples in self.batches:
            inputs = self._read(samples)
            if inputs["batch"] is not None:
                return inputs
        raise DataError(f"no held-out sample of {self.data.samples.path} can be used; see the reasons above")

    def _agree(self, failures: list[FailedSample], processes: Processes, stops: Any) -> None:
        """Every process sees the failures of all of them, and stops where one of them does."""
        for failure in failures:
            if failure.fatal:
                raise MisalignedRowError(failure.reason)
        failed, stopped = processes.sum([float(len(failures)), float(bool(stops))])
        if failed:
            for failure in processes.gather(failures):
                self.data.rejects.add(failure.sample_id, failure.reason, key=failure.key)
        if stopped:
            raise StoppedError

    @contextmanager
    def _own_targets(self, objective: Objective) -> Iterator[None]:
        """Have the objective read this set's targets, in place of those of training."""
        if self.teachers is None:
            yield
            return
        before = [(known.source, known.logit_codec) for known in objective.teachers]
        try:
            for known, own in zip(objective.teachers, self.teachers, strict=False):
                known.source, known.logit_codec = own.source, own.logit_codec
            yield
        finally:
            for known, (source, codec) in zip(objective.teachers, before, strict=True):
                known.source, known.logit_codec = source, codec

    def _means(
        self, sums: dict[str, float], counts: dict[str, float], factors: dict[str, float], processes: Processes
    ) -> dict[str, float]:
        names = [*self.terms, *(_COMPARED if self.agreement else ())]
        found = processes.sum([*(sums.get(name, 0.0) for name in names), *counts.values()])
        sums, counts = dict(zip(names, found, strict=False)), dict(zip(_COUNTS, found[len(names) :], strict=True))
        means = {name: sums[name] / over for name in self.terms if (over := counts[averaged_over(name)])}
        weights = term_weights(self.recipe)
        loss = sum(weights[name] * factors.get(name, 1.0) * mean for name, mean in means.items() if weights[name] > 0)
        agreeing = {"agreement": sums["agreeing"] / sums["compared"]} if sums.get("compared") else {}
        return {"loss": loss, **means, **agreeing, "samples": counts["samples"], "answers": counts["answers"]}


def _add(sums: dict[str, torch.Tensor], outcome: Any) -> None:
    found = dict(outcome["terms"])
    if outcome["agreement"] is not None:
        found |= dict(zip(_COMPARED, outcome["agreement"], strict=True))
    for name, value in found.items():
        sums[name] = value.detach().double() + sums[name] if name in sums else value.detach().double()


def _on_host(values: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """All values in one copy."""
    if not values:
        return {}
    return dict(zip(values, torch.stack([value.double() for value in values.values()]).tolist(), strict=True))
