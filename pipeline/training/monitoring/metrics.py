"""What a run logs: terms, speed, waiting and memory between two log lines, appended to ``metrics.jsonl``.

Every process counts its own micro-batches; a line holds the totals over all of them and costs one copy to the host.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from alignkd.errors import CheckpointError, wrap_errors
from alignkd.inputs.batch import Counts
from alignkd.losses.term_registry import averaged_over
from alignkd.pipeline.runtime.devices import peak_memory_bytes
from alignkd.pipeline.runtime.files import replace_text
from alignkd.pipeline.training.monitoring.by_author import ByAuthor
from alignkd.targets.several import teacher_name

Reduce = Callable[[torch.Tensor], torch.Tensor]
"""Sums a small float64 vector over processes. A process that had no batch yet gives its vector on the CPU."""

OBSERVED = ("attention_contrast",)
"""Outputs that are not terms. A line has their mean over micro-batches, without those where they are NaN."""

PRECISION = "precision/{}"
"""Name of the output that is a term's learned precision, which multiplies the recipe's weight."""

_COUNTED = ("samples", "tokens", "answers", "truncated", "padding")
"""Totals since the start of the run. ``truncated`` counts the samples that were cut at the maximum length, ``padding`` the
positions among the ``tokens`` that only fill micro-batches up."""


class Metrics:
    """Sums between two log lines, and the file they go to.

    ``weights``: the factor of each unweighted term in the loss; where they are ``learned``, :data:`PRECISION` multiplies
    it. ``writes``: True on the first process only. ``teachers``: how many, where there are several: a line then has what each
    of them taught, ``TERM/TEACHER``, and how many samples. ``answer_terms``: the terms that each answer token has, which are
    told apart by who wrote the answers.
    """

    def __init__(
        self,
        path: Path,
        weights: Mapping[str, float],
        *,
        writes: bool,
        learned: bool = False,
        teachers: int = 0,
        answer_terms: Sequence[str] = (),
    ) -> None:
        self.path, self.weights, self.writes = path, dict(weights), writes
        self._terms = ("loss", *weights)
        names = [teacher_name(number) for number in range(teachers)]
        taught = [term for term, weight in weights.items() if weight > 0 and term != "supervised"]
        self._counted = (*_COUNTED, *(f"samples/{name}" for name in names))
        self._of_teachers = {
            f"{term}/{name}": (number, averaged_over(term)) for number, name in enumerate(names) for term in taught
        }
        self._observed = (*OBSERVED, *(PRECISION.format(name) for name, weight in weights.items() if learned and weight > 0))
        self._observed += tuple(f"{observed}/{name}" for observed in OBSERVED for name in names)
        self._summed = (*self._terms, *self._observed, *(f"{name}/batches" for name in self._observed), *self._of_teachers)
        self.by_author = ByAuthor(answer_terms)
        self.last: dict[str, Any] = {}
        """The latest line, of a run that was resumed the one before."""
        self._start({}, 0)

    def _start(self, state: Mapping[str, Any], step: int) -> None:
        # One process alone continues the sums of the checkpoint, or they would count once for each process.
        since = state.get("since_line", {}) if self.writes else {}
        self._sums = torch.tensor([since.get(name, 0.0) for name in self._summed])
        self._seen = {name: since.get(f"seen/{name}", 0) for name in self._terms}
        self._counts = {name: since.get(name, 0) for name in self._counted}
        self._over = {name: since.get(f"over/{name}", 0.0) for name in self._of_teachers}
        counted_before = state.get("since_line", {})
        self._until_line = {name: int(state.get(name, 0) - counted_before.get(name, 0)) for name in self._counted}
        self._line_step = int(state.get("line_step", step))
        self._seconds_before = float(state.get("seconds", 0.0))
        self._line_seconds = float(state.get("line_seconds", self._seconds_before))
        self._waited = 0.0
        self.by_author.resume(state, since)
        self._started = self._waiting_since = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Spent so far, the time before a resume included."""
        return self._seconds_before + time.perf_counter() - self._started

    def add(
        self,
        outputs: Mapping[str, torch.Tensor],
        *,
        samples: int,
        tokens: int,
        answers: int,
        truncated: int = 0,
        padding: int = 0,
    ) -> None:
        """Count a micro-batch; nothing is copied to the host here.

        ``outputs``: scalars. ``loss`` and the unweighted terms are this process's share of the step's mean, so that they
        add up over micro-batches and processes. Names that are neither terms nor observed are ignored. ``truncated``: how
        many of the ``samples`` were cut at the maximum length; ``padding``: how many of the ``tokens`` are padding.
        """
        for name in self._terms:
            if name in outputs:
                self._add(name, outputs[name].detach())
                self._seen[name] += 1
        for name in self._observed:
            if name in outputs:
                value = outputs[name].detach().float()
                self._add(name, value.nan_to_num(0.0))
                self._add(f"{name}/batches", ~value.isnan())
        for name, count in zip(_COUNTED, (samples, tokens, answers, truncated, padding), strict=True):
            self._counts[name] += count

    def add_of_teachers(self, sums: Mapping[str, torch.Tensor], taught: Sequence[Counts]) -> None:
        """Count what each teacher taught in a micro-batch. ``sums`` of its terms over what it has targets for, ``taught``."""
        for number, counts in enumerate(taught):
            self._counts[f"samples/{teacher_name(number)}"] += int(counts.samples)
        for name, (number, over) in self._of_teachers.items():
            if name in sums:
                self._add(name, sums[name])
                self._over[name] += getattr(taught[number], over)

    def _add(self, name: str, value: torch.Tensor) -> None:
        if self._sums.device != value.device:
            self._sums = self._sums.to(value.device)
        self._sums[self._summed.index(name)].add_(value)

    def waited(self, seconds: float) -> None:
        """Count time that the loop spent waiting for a batch."""
        self._waited += seconds

    def line(self, logs: Mapping[str, Any], *, step: int, epoch: float, reduce: Reduce | None = None) -> dict[str, Any]:
        """The log line of a step, also appended to the file. Every process calls it, and gets the same totals.

        Terms and ``loss`` are means over the steps since the last line. Where no micro-batch had a loss, the ``loss`` in
        ``logs`` stays; a term that no micro-batch had is absent. Peak memory and seconds are this process's own.
        """
        since, seconds = self._since_line(reduce), self.seconds
        steps, interval = max(step - self._line_step, 1), max(seconds - self._line_seconds, 1e-9)
        means = {name: since[name] / steps for name in self._terms if since[f"seen/{name}"]}
        observed = {name: since[name] / since[f"{name}/batches"] for name in self._observed if since[f"{name}/batches"]}
        in_loss = {name: weight * observed.get(PRECISION.format(name), 1.0) for name, weight in self.weights.items()}
        # A term without weight may overflow: 0 times infinity would make every share NaN.
        weighted = {name: weight * means[name] if weight > 0 else 0.0 for name, weight in in_loss.items() if name in means}
        total = sum(weighted.values())
        own = {name: since[name] / over for name in self._of_teachers if (over := since[f"over/{name}"])}
        for name in self._counted:
            self._until_line[name] += int(since[name])
        line = {
            "step": step,
            "epoch": round(epoch, 5),
            **self._until_line,
            "seconds": round(seconds, 3),
            "tokens_per_second": round(since["tokens"] / interval, 3),
            "samples_per_second": round(since["samples"] / interval, 3),
            "padding_share": round(since["padding"] / since["tokens"], 5) if since["tokens"] else 0.0,
            "data_wait_share": round(since["waited"] / max(since["seconds"], 1e-9), 5),
            **logs,
            **means,
            **{f"weighted/{name}": value for name, value in weighted.items()},
            **{f"share/{name}": value / total if total else 0.0 for name, value in weighted.items()},
            **observed,
            **own,
            **self.by_author.line(since),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        self._forget(step, seconds)
        self.last = line
        self.write(line)
        return line

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line about something else than training, such as held-out samples; its names begin with ``eval/``."""
        if self.writes:
            with self.path.open("a") as file:
                file.write(_as_json(line) + "\n")

    def leave_out(self, seconds: float) -> None:
        """Count these seconds, which were not spent on training, neither as time nor as waiting."""
        self._started += seconds
        self._waiting_since += seconds

    def _since_line(self, reduce: Reduce | None) -> dict[str, float]:
        waited = {"waited": self._waited, "seconds": time.perf_counter() - self._waiting_since}
        seen = {f"seen/{name}": count for name, count in self._seen.items()}
        over = {f"over/{name}": count for name, count in self._over.items()}
        counted = {**seen, **self._counts, **over, **self.by_author.samples, **waited}
        sums = torch.cat((self._sums, self.by_author.sums.to(self._sums.device)))
        values = torch.tensor(list(counted.values()), dtype=torch.float64)
        if reduce is None:
            found = sums.tolist() + values.tolist()
        else:
            found = reduce(torch.cat((sums.double(), values.to(sums.device)))).tolist()
        return dict(zip((*self._summed, *self.by_author.names, *counted), found, strict=True))

    def _forget(self, step: int, seconds: float) -> None:
        self._sums = torch.zeros_like(self._sums)
        self._seen, self._counts = dict.fromkeys(self._terms, 0), dict.fromkeys(self._counted, 0)
        self._over = dict.fromkeys(self._of_teachers, 0.0)
        self._line_step, self._line_seconds = step, seconds
        self._waited, self._waiting_since = 0.0, time.perf_counter()

    def state_dict(self, reduce: Reduce | None = None) -> dict[str, Any]:
        """Totals over processes, and the sums since the last line. With ``reduce``, every process calls it."""
        since = self._since_line(reduce)
        return {
            **{name: self._until_line[name] + int(since[name]) for name in self._counted},
            "seconds": self.seconds,
            **self.by_author.totals(since),
            "line_step": self._line_step,
            "line_seconds": self._line_seconds,
            "since_line": {name: value for name, value in since.items() if name not in ("waited", "seconds")},
        }

    def resume(self, state: Mapping[str, Any], step: int, *, evaluated: int = 0) -> None:
        """Continue from a checkpoint's state (empty: from the start), with any number of processes.

        Lines of steps that are run again are dropped from the file, and evaluations of steps after ``evaluated``.

        Raises:
            CheckpointError: the state or the file is damaged.
        """
        damaged = f"--resume: the totals of {self.path.parent} in the checkpoint are damaged: remove it to resume from another"
        with wrap_errors(CheckpointError, damaged, TypeError, ValueError, AttributeError, RuntimeError):
            self._start(state, step)
        if self.writes:
            lines = _lines_up_to(self.path, step, evaluated) if self.path.exists() else []
            replace_text(self.path, "".join(line + "\n" for line in lines))
            found = [line for text in reversed(lines) if "loss" in (line := json.loads(text))]
            self.last = found[0] if found else {}


def _lines_up_to(path: Path, step: int, evaluated: int) -> list[str]:
    """The log lines of steps up to this one; those of evaluations, up to the step last ``evaluated``."""
    damaged = f"--resume: {path} is damaged: remove it, or the lines that are not JSON"
    with wrap_errors(CheckpointError, damaged, ValueError, KeyError, TypeError, RecursionError):
        lines = path.read_text().splitlines()
        # A kill can cut the last line short; it belongs to a step that is run again.
        whole = [(line, json.loads(line)) for line in lines if line.endswith("}")]
        return [line for line, found in whole if found["step"] <= (evaluated if _is_evaluation(found) else step)]


def _is_evaluation(line: Mapping[str, Any]) -> bool:
    return any(name.startswith("eval/") for name in line)


def _as_json(line: Mapping[str, Any]) -> str:
    """NaN and infinity become null, as JSON has neither."""
    not_finite = {name: None for name, value in line.items() if isinstance(value, float) and not math.isfinite(value)}
    return json.dumps({**line, **not_finite}, allow_nan=False)
