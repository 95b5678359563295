"""``alignkd benchmark run``: a model's answers to official benchmarks, and their scores, below one folder.

Each of several processes answers a share of the questions without waiting for the others; the one that completes a benchmark
scores it. A run that is interrupted continues with the questions that have no answer yet, in any number of processes.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alignkd.errors import DataError
from alignkd.models.loading import load_vlm
from alignkd.models.vlm import Vlm
from alignkd.pipeline.config.benchmark import BenchmarkRunConfig
from alignkd.pipeline.evaluate.benchmarks.contract import Benchmark
from alignkd.pipeline.evaluate.running import identity
from alignkd.pipeline.evaluate.running.answering import Answering, RunSettings
from alignkd.pipeline.evaluate.running.before import open_all
from alignkd.pipeline.evaluate.running.hold import holding
from alignkd.pipeline.evaluate.running.parts import AGAIN, Parts
from alignkd.pipeline.evaluate.running.results import write_results
from alignkd.pipeline.evaluate.running.schedule import share_of
from alignkd.pipeline.hub.models import model_folder, pin_models, tower_folder
from alignkd.pipeline.runtime.devices import device_words, parse_dtype, pick_device
from alignkd.pipeline.runtime.logs import log_start
from alignkd.pipeline.runtime.out_folder.write_faults import explained_write_faults
from alignkd.pipeline.runtime.progress import progress_bar
from alignkd.pipeline.runtime.ranks import Worker, find_worker
from alignkd.pipeline.runtime.run_record import write_run_record
from alignkd.pipeline.runtime.signals import StopFlag, stop_on_signals
from alignkd.plugins import load_plugins

_log = logging.getLogger(__name__)


def benchmark_run(config: BenchmarkRunConfig) -> list[dict[str, Any]]:
    """Answer and score all benchmarks; returns the results of those that are complete when this process is done.

    Raises:
        AlignkdError: bad input, found before the model is loaded where it can be; or answers without a score, once all
            benchmarks are answered.
        Interrupted: a signal came; the same command continues.
    """
    load_plugins(config.plugins)
    worker = find_worker()
    benchmarks = open_all(config)
    config = pin_models(config)
    device = pick_device(config.device, worker.local_rank)
    dtype = config.dtype or ("float16" if device.startswith("cuda") else "float32")
    out = Path(config.out)
    for benchmark in benchmarks:
        identity.check_same(_parts(out, benchmark), identity.of_benchmark(benchmark, dtype, config.template))
    with stop_on_signals() as stop, holding(out, worker, stop.check):
        if worker.rank == 0:
            with explained_write_faults(out, "run.json", again=AGAIN):
                write_run_record(out / "run.json", "benchmark run", {**asdict(config), "dtype": dtype})
        tower = tower_folder(config.vision_tower)
        vlm = load_vlm(model_folder(config.model), dtype=parse_dtype(dtype), device=device, vision_tower=tower)
        log_start(
            "benchmark run",
            rank=worker,
            device=device_words(str(vlm.device)),
            model=config.model,
            data=", ".join(f"{b.about.name} ({len(b.questions):,} questions)" for b in benchmarks),
            plan=f"protocol {config.protocol}, {dtype}, {config.batch_tokens:,} positions a batch",
            out=config.out,
        )
        return _Run(config, vlm, worker, stop, dtype).results(benchmarks)


class _Run:
    """One process of a run, its model loaded."""

    def __init__(self, config: BenchmarkRunConfig, vlm: Vlm, worker: Worker, stop: StopFlag, dtype: str) -> None:
        self.config, self.vlm, self.worker, self.stop, self.dtype = config, vlm, worker, stop, dtype
        self.out, self.model = Path(config.out), identity.of_model(vlm)

    def results(self, benchmarks: list[Benchmark]) -> list[dict[str, Any]]:
        """Those of the benchmarks that are complete."""
        found, refused = [], list[str]()
        for benchmark in benchmarks:
            try:
                result = self._one(benchmark)
            except _NoScoreError as error:
                refused.append(f"{benchmark.about.title}: {error}")
                continue
            if result is not None:
                found.append(result)
        if refused:
            raise DataError(f"answers are in {self.out}, but not all of them have a score. {'. '.join(refused)}")
        return found

    def _one(self, benchmark: Benchmark) -> dict[str, Any] | None:
        folder = _parts(self.out, benchmark)
        answering = Answering(self.vlm, benchmark, self._settings(folder))
        prompts = identity.of_prompts(answering)
        given = identity.of_benchmark(benchmark, self.dtype, answering.template) | self.model | prompts
        identity.claim(folder, given)
        parts = Parts(folder, benchmark.questions)
        self._answer_share(benchmark, answering, parts)
        answers = parts.read()
        if left := len(benchmark.questions) - len(answers):
            _log.info("%s: this process is done; %d questions are left to others", benchmark.about.title, left)
            return None
        settings = self._about(benchmark, prompts)
        try:
            result = write_results(folder.parent, benchmark, answers, self.config.model, settings)
        except DataError as error:
            raise _NoScoreError(str(error)) from error
        _log.info("%s: %.2f %s", benchmark.about.title, result["score"], result["unit"])
        return result

    def _answer_share(self, benchmark: Benchmark, answering: Answering, parts: Parts) -> None:
        there, share = parts.read(), share_of(benchmark.questions, self.worker)
        pending = [index for index in share if index not in there]
        if there:
            _log.info(
                "%s: %d of %d questions are answered already", benchmark.about.title, len(there), len(benchmark.questions)
            )
        done = len(share) - len(pending)
        with (
            parts.writer(self.worker) as write,
            progress_bar(benchmark.about.name, len(share), "questions", done=done) as progress,
        ):
            self.stop.check()
            for batch in answering(pending):
                write(batch)
                progress.advance(len(batch))
                self.stop.check()

    def _settings(self, folder: Path) -> RunSettings:
        # A template that writes a date writes the same one when the run is continued.
        date = self.config.prompt_date or identity.stored(folder).get("prompt_date") or datetime.now(UTC).date().isoformat()
        return RunSettings(self.config.template, self.config.batch_tokens, date)

    def _about(self, benchmark: Benchmark, prompts: Mapping[str, Any]) -> dict[str, Any]:
        about = {"max_new_tokens": benchmark.max_new_tokens, "dtype": self.dtype, "decoding": "greedy, one beam"}
        about |= {name: value for name, value in prompts.items() if value}
        about["weights_sha256"] = self.model["weights_sha256"]
        return about | ({"limit": self.config.limit} if self.config.limit else {})


class _NoScoreError(DataError):
    """The scorer of a benchmark refuses its answers."""


def _parts(out: Path, benchmark: Benchmark) -> Path:
    return out / benchmark.about.name / "parts"
