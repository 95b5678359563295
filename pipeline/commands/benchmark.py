"""``alignkd benchmark``: the names of its commands, and the module that each is in. Nothing is imported until it is used."""

import click

from alignkd.pipeline.commands.options import job_command as options
from alignkd.pipeline.commands.options.lazy import LazyCommands

_COMMANDS = {
    "run": "benchmark_run:benchmark_run_command",
    "score": "benchmark_score:benchmark_score_command",
    "report": "benchmark_report:benchmark_report_command",
}


class _Subcommands(LazyCommands, options.CommandGroup):
    modules = _COMMANDS


@click.group("benchmark", cls=_Subcommands, short_help="Models on official benchmarks: run, score, report.")
def benchmark() -> None:
    """Score models on GQA, ScienceQA-IMG, TextVQA, MME, MMBench and POPE, from the official files."""
