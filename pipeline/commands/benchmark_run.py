"""``alignkd benchmark run``."""

from typing import Any

import click

from alignkd.pipeline.commands.options import job_command as options
from alignkd.pipeline.commands.options.from_config import from_options, options_of
from alignkd.pipeline.commands.output.printing import say, say_json
from alignkd.pipeline.commands.output.scores import score_text
from alignkd.pipeline.config.benchmark import BenchmarkRunConfig


@click.command("run", cls=options.JobCommand, short_help="Answers of a model to official benchmarks, and their scores.")
@options_of(BenchmarkRunConfig)
@options.as_json
def benchmark_run_command(as_json: bool, **given: Any) -> None:
    """Have a model answer official benchmarks, and score its answers. A rerun continues where the last one ended.

    Several processes share the work: start the same command with torchrun or srun.

    \b
    Example:
      alignkd benchmark run --model run/student --benchmark gqa,pope --root benchmarks --out scores
    """
    config = from_options(BenchmarkRunConfig, given)
    from alignkd.pipeline.runtime.signals import resumable_from_the_start

    with resumable_from_the_start():
        from alignkd.pipeline.evaluate.running.run import benchmark_run

        results = benchmark_run(config)
    if as_json:
        say_json({"out": config.out, "results": results})
        return
    for result in results:
        say(score_text(result))
