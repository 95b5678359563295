"""What a run does at an evaluation: measure, log, keep the best student, and end where none is better any more."""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from alignkd.errors import ConfigError
from alignkd.models.vlm import Vlm
from alignkd.objective import Objective
from alignkd.pipeline.evaluate.benchmarks.contract import Benchmark
from alignkd.pipeline.evaluate.running.answering import Answering, RunSettings, as_answers
from alignkd.pipeline.evaluate.running.schedule import share_of
from alignkd.pipeline.hub.card_file import record_of, write_card
from alignkd.pipeline.runtime.processes import Processes
from alignkd.pipeline.runtime.ranks import Worker
from alignkd.pipeline.runtime.signals import StopFlag
from alignkd.pipeline.training.evaluation.best import Best, keep, read_best, restore
from alignkd.pipeline.training.evaluation.held_out import HeldOut, StoppedError
from alignkd.pipeline.training.evaluation.plan import EvaluationPlan, best_names

_log = logging.getLogger(__name__)


class EndedEarlyError(Exception):
    """The checkpoint that a run goes on from is already its end: no better figure for as long as ``--patience`` allows."""


@dataclass
class Evaluation:
    """The evaluations of one run. ``write``: puts the student into a folder; every process calls it, the first one writes.

    ``patience``: evaluations without a better figure after which the run ends; None: it never does.
    """

    plan: EvaluationPlan
    held_out: HeldOut | None
    settings: RunSettings
    out: Path
    processes: Processes
    stop: StopFlag
    write: Callable[[Path], None]
    best: Best | None = None
    patience: int | None = None
    ended_early: bool = False
    done_step: int = 0
    last: dict[str, float] = field(default_factory=dict)

    def choose_best(self, name: str | None, patience: int | None) -> None:
        """Which figure decides.

        Raises:
            ConfigError: it is not measured; names those that are.
        """
        if name is None:
            return
        terms, agreement = (self.held_out.terms, self.held_out.agreement) if self.held_out else ([], False)
        known = best_names(self.plan, terms, agreement=agreement)
        if name not in known:
            raise ConfigError(f"--keep-best {name} is not measured in this run; measured are {', '.join(known)}")
        self.best, self.patience = Best.of(name, self.plan.benchmarks), patience
        if self.processes.first:
            restore(self.out)

    def due(self, step: int, last: int) -> bool:
        """Whether a step is still to be evaluated."""
        return self.plan.due(step, last) and self.done_step != step

    def __call__(
        self, model: Any, objective: Objective, autocast: Callable[[], AbstractContextManager[Any]], *, step: int
    ) -> tuple[dict[str, float], float] | None:
        """The figures after a step, by name, and the seconds taken; None where a signal came meanwhile.

        The student's modes and torch's random numbers are as before. Every process calls it.
        """
        started, training = time.perf_counter(), objective.training
        devices = [objective.vlm.device] if objective.vlm.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices), autocast():
                objective.eval()
                found = self.held_out.measure(model, objective, self.processes, self.stop) if self.held_out else {}
                for name, benchmark in self.plan.benchmarks.items():
                    found[f"benchmark/{name}"] = self._score(objective.vlm, benchmark)
        except StoppedError:
            return None
        finally:
            objective.train(training)
        self.done_step, self.last = step, found
        seconds = time.perf_counter() - started
        self._keep_best(found, step)
        return found, seconds

    def _score(self, vlm: Vlm, benchmark: Benchmark) -> float:
        """Each process answers its share of the pictures.

        Raises:
            StoppedError: a signal came to some process.
            DataError: a picture or a question cannot be used, or the answers have no score.
        """
        worker = Worker(rank=self.processes.rank, world_size=self.processes.world_size)
        found = list[tuple[int, str]]()
        for batch in Answering(vlm, benchmark, self.settings)(share_of(benchmark.questions, worker)):
            found += [(answered.index, answered.text) for answered in batch]
            if self.stop:
                break
        if self.processes.sum([float(bool(self.stop))])[0]:
            raise StoppedError
        return benchmark.score(as_answers(benchmark, dict(self.processes.gather(found)))).score

    def _keep_best(self, found: Mapping[str, float], step: int) -> None:
        if self.best is None:
            return
        name = self.best.name
        value = found.get(f"benchmark/{name}" if name in self.plan.benchmarks else name)
        if self.best.add(value, step):
            _log.info("step %d: the best %s so far, %.5g", step, name, value)
            if self.processes.first:
                keep(self.out, self.best, self._write_with_card)
            else:
                self.write(self.out)
        self.processes.wait()
        if self.patience is not None and self.best.since >= self.patience:
            self.ended_early = True
            _log.info(
                "no better %s in %d evaluations: the run ends at step %d; the best was %.5g at step %d",
                *(name, self.best.since, step, self.best.value, self.best.step),
            )

    def _write_with_card(self, folder: Path) -> None:
        self.write(folder)
        if self.best is not None and (folder / "student").is_dir():
            write_card(folder / "student", record_of(self.out), best=self.best.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"step": self.done_step, "best": self.best.state_dict() if self.best else None}

    def resume(self, state: Any) -> None:
        """Continue from a checkpoint's; a student that was kept after it counts.

        Raises:
            CheckpointError: it is damaged.
        """
        if isinstance(state, Mapping):
            self.done_step = state["step"] if type(state.get("step")) is int else 0
            if self.best is not None:
                self.best.resume(state.get("best"))
                self.ended_early = self.patience is not None and self.best.since >= self.patience

    def fingerprint(self) -> str | None:
        """Digest of the held-out samples; None without."""
        return self.held_out.data.fingerprint() if self.held_out else None

    def figures(self) -> dict[str, Any]:
        """What the run's result says."""
        if self.plan.empty:
            return {}
        best = {"best": read_best(self.out)} if self.best is not None else {}
        return {"held_out": self.last, **best, "ended_early": self.ended_early}
