"""Warnings from the log lines of a run, and a stop when a loss is no longer a finite number."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from alignkd.errors import AlignkdError
from alignkd.losses.recipes import Recipe, term_weights
from alignkd.pipeline.runtime.host_copy import copy_to_host
from alignkd.targets.logit_settings import DIVERGENCE_NAMES

LINES = 10
"""How many log lines in a row a condition must hold for a warning."""

_PARTS = {name: (name,) for name in ("supervised", *DIVERGENCE_NAMES, "attention")} | {"vision": ("vision_all", "vision_focus")}
"""Each weight of a recipe, and the logged terms that it sets. The focus is a small part of the vision term by design.
A weight that is not here, of a term from outside the package, sets the term of its own name."""

NEGLIGIBLE, DOMINANT = 0.01, 0.90
"""Shares of the weighted loss below and above which a term gets a warning."""

UNIFORM = 1e-3
"""Contrast of the teacher's attention (see :mod:`alignkd.losses.uniformity`) below which it counts as uniform."""

_NAMED = 10
"""How many samples an error names; it counts the others."""


class HealthChecks:
    """Reads log lines and returns warnings, each once as long as its cause lasts.

    ``max_length``: token ids a sample may have, for the warning about truncated samples. ``reported``: the latest text of each
    warning, by what it is about; a run that is resumed continues it.
    """

    def __init__(self, recipe: Recipe, *, lines: int = LINES, max_length: int | None = None) -> None:
        self.recipe, self.lines, self.max_length = recipe, lines, max_length
        self.active = tuple(name for name, weight in recipe.weights.items() if weight > 0)
        self._lasting: dict[tuple[str, str], int] = {}
        self.reported: dict[str, str] = {}

    def __call__(self, line: Mapping[str, Any]) -> list[str]:
        """The warnings that are due at this line."""
        due = {**self._truncation(line), **self._shares(line, self.lines), **self._uniformity(line, self.lines)}
        self.reported |= due
        return list(due.values())

    def resume(self, reported: Any) -> None:
        """Continue from the ``reported`` of a checkpoint, if there are any."""
        if isinstance(reported, Mapping):
            self.reported = {str(about): str(text) for about, text in reported.items()}

    def closing(self, line: Mapping[str, Any]) -> list[str]:
        """The warnings that stand at the end of a run: all that were reported, and what its last ``line`` alone shows.

        A run may be too short for a condition to last.
        """
        last = HealthChecks(self.recipe, lines=1, max_length=self.max_length)
        return list((last._shares(line, 1) | last._uniformity(line, 1) | self.reported | last._truncation(line)).values())

    def _truncation(self, line: Mapping[str, Any]) -> dict[str, str]:
        """Once a run: the first line that counts a truncated sample."""
        truncated = line.get("truncated", 0)
        if "truncated" in self.reported or not truncated:
            return {}
        limit = "--max-length" + (f" {self.max_length}" if self.max_length else "")
        text = (
            f"{truncated:,} of the first {line['samples']:,} samples were longer than {limit} and were cut there: the rest of"
            " their conversations is not learned. metrics.jsonl counts them as 'truncated'. Raise --max-length to keep more (a"
            " cache must be written with the same)"
        )
        return {"truncated": text}

    def _shares(self, line: Mapping[str, Any], lines: int) -> dict[str, str]:
        # Learned weights give every term the same share in the end.
        if len(self.active) < 2 or self.recipe.weighting == "learned":
            return {}
        found = {}
        many = f"{lines} log lines" if lines > 1 else "the last log line"
        for name in self.active:
            shares = [line[f"share/{part}"] for part in _PARTS.get(name, (name,)) if f"share/{part}" in line]
            share = sum(shares) if shares else math.nan
            weight = f"its weight (--set {name}=..., now {self.recipe.weights[name]:g})"
            when = f"of the loss in {many} (now {share:.2%}, step {line['step']})"
            if self._lasts("negligible", name, share < NEGLIGIBLE):
                found[f"share/{name}"] = (
                    f"{name} was below {NEGLIGIBLE:.0%} {when}: it has almost no effect. Raise {weight}, or set it to 0 to save"
                    " its cost"
                )
            if self._lasts("dominant", name, share > DOMINANT):
                found[f"share/{name}"] = (
                    f"{name} was above {DOMINANT:.0%} {when}: the other terms have almost no effect. Lower {weight}, or raise"
                    " theirs"
                )
        return found

    def _uniformity(self, line: Mapping[str, Any], lines: int) -> dict[str, str]:
        names = ("attention_contrast", *(name for name in line if name.startswith("attention_contrast/")))
        found = dict[str, str]()
        for name in names:
            found |= self._uniform(name.partition("/")[2], line.get(name, math.nan), line["step"], lines)
        return found

    def _uniform(self, teacher: str, contrast: float, step: int, lines: int) -> dict[str, str]:
        """``teacher``: its name, empty where there is one."""
        if not self._lasts("uniform", f"attention{teacher}", contrast < UNIFORM):
            return {}
        whose = f"the attention of {teacher}" if teacher else "the teacher's attention"
        many = f"{lines} log lines" if lines > 1 else "the last log line"
        terms = [name for name in ("attention", "vision_focus") if term_weights(self.recipe)[name] > 0] or ["attention"]
        text = (
            f"{whose} over vision tokens was uniform in {many} (relative variance"
            f" {contrast:.1e}, step {step}): there is nothing to learn from it. Look at the teacher with alignkd show"
            f" --plot; if its attention is right, switch the term off ({' '.join(f'--set {name}=0' for name in terms)})"
        )
        return {f"uniform{teacher}": text}

    def _lasts(self, kind: str, name: str, holds: bool) -> bool:
        """Whether a condition holds in the last ``lines`` lines, and did not in the one before them: once an episode."""
        key = (kind, name)
        self._lasting[key] = self._lasting.get(key, 0) + 1 if holds else 0
        return self._lasting[key] == self.lines


class NotFiniteError(AlignkdError):
    """A loss term of some samples is not a finite number."""

    def __init__(self, step: int, bad: Sequence[str], samples: int) -> None:
        self.step, self.sample_ids = step, tuple(bad)
        named = ", ".join(bad[:_NAMED]) + (f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else "")
        cause = (
            "It is so for every sample of the batch, so the weights themselves are probably not finite: lower --learning-rate"
            if len(bad) == samples > 1
            else "Look at them with alignkd show --id ID and alignkd cache inspect --id ID; if they look right,"
            " lower --learning-rate"
        )
        super().__init__(
            f"step {step}: a loss term is not a finite number for {len(bad)} of {samples} samples: {named}. Nothing of this"
            f" step was saved. {cause}, or use --dtype bfloat16 in place of float16; then continue with --resume"
        )


@dataclass(frozen=True)
class _Flags:
    """Flags of a micro-batch on their way to the host; ``arrived`` is None where there is nothing to wait for."""

    bad_B: torch.Tensor
    arrived: torch.cuda.Event | None
    sample_ids: tuple[str, ...]
    step: int


class FiniteCheck:
    """Finds the samples whose loss is not finite, without making the device wait.

    It looks at loss terms, not at gradients: with float16 the gradient scaler handles an overflowing gradient.

    Shapes: B samples of a micro-batch.
    """

    def __init__(self) -> None:
        self._flags: deque[_Flags] = deque()

    def add(self, bad_B: torch.Tensor, sample_ids: Sequence[str], *, step: int) -> None:
        """Note a micro-batch: ``bad_B`` is True where a term of that sample is not finite."""
        assert bad_B.dtype == torch.bool
        assert bad_B.shape == (len(sample_ids),)
        host, arrived = copy_to_host({"bad": bad_B.clone()})
        self._flags.append(_Flags(host["bad"], arrived, tuple(sample_ids), step))

    def check(self, *, wait: bool = False) -> None:
        """Look at the flags that have arrived; with ``wait``, as before a checkpoint is saved, at all of them.

        Raises:
            NotFiniteError: names the samples.
        """
        while self._flags and (wait or _has_arrived(self._flags[0])):
            flags = self._flags.popleft()
            if flags.arrived is not None:
                flags.arrived.synchronize()
            if bool(flags.bad_B.any()):
                bad = [name for name, is_bad in zip(flags.sample_ids, flags.bad_B.tolist(), strict=True) if is_bad]
                raise NotFiniteError(flags.step, bad, len(flags.sample_ids))


def _has_arrived(flags: _Flags) -> bool:
    return flags.arrived is None or bool(flags.arrived.query())  # type: ignore[no-untyped-call]
