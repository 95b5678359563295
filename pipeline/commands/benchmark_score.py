"""``alignkd benchmark score``. Neither a model nor torch is loaded."""

from typing import Any

import click

from alignkd.pipeline.commands.options import job_command as options
from alignkd.pipeline.commands.options.from_config import from_options, options_of
from alignkd.pipeline.commands.output.printing import say, say_json
from alignkd.pipeline.commands.output.scores import metrics_text, score_text
from alignkd.pipeline.config.benchmark import BenchmarkScoreConfig


@click.command("score", cls=options.CommandWithSettings, short_help="Score an answer file that any tool wrote.")
@options_of(BenchmarkScoreConfig)
@options.as_json
def benchmark_score_command(as_json: bool, **given: Any) -> None:
    """Score an answer file in LLaVA's format, whichever tool wrote it. No model and no pictures are needed.

    \b
    Example:
      alignkd benchmark score --benchmark gqa --root benchmarks --answers answers.jsonl
    """
    config = from_options(BenchmarkScoreConfig, given)
    from alignkd.pipeline.evaluate.benchmarks.result import score_file, write_result

    result, readings = score_file(config.benchmark, config.root, config.answers, config.protocol)
    if config.out is not None:
        write_result(config.out, result, readings)
    if as_json:
        say_json(result)
    else:
        say(score_text(result))
        say(metrics_text(result))
