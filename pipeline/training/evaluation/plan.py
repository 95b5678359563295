"""What a run is asked to evaluate, checked before anything is loaded."""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.errors import ConfigError, DataError
from alignkd.pipeline.config.distill import DistillConfig
from alignkd.pipeline.config.shared import several
from alignkd.pipeline.data.image_paths import check_image_folder
from alignkd.pipeline.data.open_samples import describe_data
from alignkd.pipeline.evaluate.benchmarks.contract import Benchmark
from alignkd.pipeline.evaluate.benchmarks.registry import open_benchmark
from alignkd.pipeline.training.evaluation.held_out_config import held_out_config
from alignkd.pipeline.training.training_arguments import zero_stage

_WANTED = re.compile(r"([a-z0-9_]+):([0-9]{1,9})")
_NAMED = 3


@dataclass(frozen=True)
class EvaluationPlan:
    """When a run is evaluated, and on which questions. ``benchmarks``: the sampled questions of each, the same all along."""

    steps: int | None = None
    held_out: bool = False
    benchmarks: Mapping[str, Benchmark] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether nothing is to be evaluated."""
        return not self.held_out and not self.benchmarks

    def due(self, step: int, last: int) -> bool:
        """Whether the run is evaluated after a step, of which the ``last`` one is the run's."""
        return not self.empty and step > 0 and (step == last or (self.steps is not None and step % self.steps == 0))


def plan_evaluation(config: DistillConfig) -> EvaluationPlan:
    """Check the options of evaluation, and open the benchmarks. No model is needed.

    Raises:
        ConfigError: options that contradict each other.
        DataError: files or pictures of a benchmark are missing.
        CacheError: there is no cache of the held-out samples.
    """
    wanted = dict(_parse(text) for text in config.eval_benchmark)
    held_out = config.eval_data is not None
    _check_options(config, held_out, bool(wanted))
    check_image_folder(config.eval_images, "--eval-images")
    _check_files(config)
    root = config.benchmark_root
    assert root is not None or not wanted
    found = {name: _sampled(open_benchmark(name, root or ""), count, config.seed) for name, count in wanted.items()}
    for name, benchmark in found.items():
        if missing := benchmark.missing_images():
            raise DataError(
                f"--eval-benchmark {name}: {len(missing)} pictures are missing in {benchmark.folder}:"
                f" {', '.join(missing[:_NAMED])}{', ...' if len(missing) > _NAMED else ''}"
            )
    return EvaluationPlan(config.eval_steps, held_out, found)


def _check_options(config: DistillConfig, held_out: bool, benchmarks: bool) -> None:
    without_data = [name for name in ("eval_cache", "eval_images") if getattr(config, name) is not None and not held_out]
    if without_data:
        raise ConfigError(f"--{without_data[0].replace('_', '-')} is about held-out samples: give --eval-data")
    if benchmarks and config.benchmark_root is None:
        raise ConfigError("--eval-benchmark needs the official files: give --benchmark-root")
    if config.benchmark_root is not None and not benchmarks:
        raise ConfigError("--benchmark-root is for --eval-benchmark, such as --eval-benchmark gqa:200, which is not given")
    if benchmarks and zero_stage(config.deepspeed) == 3:
        raise ConfigError("--eval-benchmark generates answers, which needs whole weights, and ZeRO-3 splits them: use zero2")
    if not held_out and not benchmarks:
        given = [name for name in ("eval_steps", "keep_best", "patience") if getattr(config, name) is not None]
        if given:
            option = f"--{given[0].replace('_', '-')}"
            raise ConfigError(f"{option} needs something to evaluate: give --eval-data or --eval-benchmark")
    if config.patience is not None and config.keep_best is None:
        raise ConfigError("--patience counts evaluations without a better figure: say which one with --keep-best")
    if config.patience is not None and config.eval_steps is None:
        raise ConfigError("--patience needs evaluations on the way: give --eval-steps")


def _check_files(config: DistillConfig) -> None:
    if config.eval_data is not None:
        try:
            describe_data(held_out_config(config))
        except DataError as error:
            raise DataError(f"--eval-data cannot be read: {error}") from error
    for url in several(config.eval_cache):
        CacheReader(url)  # says what is wrong with it


def _parse(text: str) -> tuple[str, int]:
    found = _WANTED.fullmatch(text.strip())
    if found is None or not int(found[2]):
        raise ConfigError(f"--eval-benchmark {text!r}: expected a benchmark and a number of questions, such as gqa:200")
    return found[1], int(found[2])


def _sampled(benchmark: Benchmark, count: int, seed: int) -> Benchmark:
    """About ``count`` questions, drawn by a seed; those that only count together are drawn together."""
    units = benchmark.units()
    random.Random(seed).shuffle(units)
    chosen: list[int] = []
    for unit in units:
        if len(chosen) >= count:
            break
        chosen += unit
    return benchmark.only(chosen)


def best_names(plan: EvaluationPlan, terms: Sequence[str], *, agreement: bool) -> list[str]:
    """The figures that ``--keep-best`` may name."""
    held_out = ["loss", *terms, *(["agreement"] if agreement else [])] if plan.held_out else []
    return [*held_out, *plan.benchmarks]
