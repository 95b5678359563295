"""The data's own answers and written ones, told apart: how many samples of each were learned, and each one's answer losses.

Sums stay on the device between two log lines, and every process counts its own micro-batches.

Shapes: A answers, B samples.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

KINDS = ("data", "written")
"""Answers of the data itself, and those that a model wrote."""
_SAMPLES = tuple(f"samples_{kind}" for kind in KINDS)


class ByAuthor:
    """Sums since the last log line, and totals of samples: a part of :class:`.metrics.Metrics`, which adds up over processes.

    ``terms``: names of the losses that each answer has. ``names``: of the entries of ``sums``, which are on the device.
    ``samples``: counts since the last line.
    """

    def __init__(self, terms: Sequence[str]) -> None:
        self.terms = tuple(terms)
        self.names = tuple(f"{kind}/{name}" for kind in KINDS for name in (*self.terms, "answers"))
        self.resume({}, {})

    def resume(self, state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's state; ``own``: the sums since its last line that this process goes on with."""
        since = state.get("since_line", {})
        self._totals = {name: int(state.get(name, 0)) - int(since.get(name, 0)) for name in _SAMPLES}
        self.samples = {name: int(own.get(name, 0)) for name in _SAMPLES}
        self.sums = torch.tensor([float(own.get(name, 0.0)) for name in self.names])

    def add(self, losses: Mapping[str, torch.Tensor], written: Sequence[bool], answer_samples_A: torch.Tensor) -> None:
        """Count a micro-batch; nothing is copied to the host here. ``losses``: ``[A]`` by term; none where they are not known.

        ``written``: for each sample, whether a model wrote its answers.
        """
        for name, count in zip(_SAMPLES, (len(written) - sum(written), sum(written)), strict=True):
            self.samples[name] += count
        if any(name not in losses for name in self.terms):
            return
        device = answer_samples_A.device
        if self.sums.device != device:
            self.sums = self.sums.to(device)
        written_B = torch.tensor(written, dtype=torch.bool).to(device, non_blocking=True)
        written_A = written_B[answer_samples_A]
        for kind, chosen_A in zip(KINDS, (~written_A, written_A), strict=True):
            for name in self.terms:
                self._add(f"{kind}/{name}", torch.where(chosen_A, losses[name].detach().float(), 0.0).sum())
            self._add(f"{kind}/answers", chosen_A.sum())

    def _add(self, name: str, value: torch.Tensor) -> None:
        self.sums[self.names.index(name)].add_(value)

    def line(self, since: Mapping[str, float]) -> dict[str, float]:
        """Fields of a log line, of the sums of all processes ``since`` the last one; begins new sums.

        Empty while no written answer was learned; with each kind's mean losses, where both kinds were.
        """
        self._totals = self.totals(since)
        self.samples, self.sums = dict.fromkeys(_SAMPLES, 0), torch.zeros_like(self.sums)
        if not self._totals["samples_written"]:
            return {}
        found: dict[str, float] = dict(self._totals)
        if all(self._totals.values()):
            for kind in KINDS:
                if answers := since[f"{kind}/answers"]:
                    found |= {f"{kind}/{name}": since[f"{kind}/{name}"] / answers for name in self.terms}
        return found

    def totals(self, since: Mapping[str, float]) -> dict[str, int]:
        """Samples of each kind since the start of the run."""
        return {name: total + int(since[name]) for name, total in self._totals.items()}
