"""``alignkd benchmark report``."""

from typing import Any

import click

from alignkd.pipeline.commands.options import job_command as options
from alignkd.pipeline.commands.options.from_config import from_options, options_of
from alignkd.pipeline.commands.output.printing import say, say_json
from alignkd.pipeline.config.benchmark_report import BenchmarkReportConfig


@click.command("report", cls=options.JobCommand, short_help="Models side by side: one page and one table.")
@click.argument("outs", nargs=-1, metavar="OUT...")
@options_of(BenchmarkReportConfig)
@options.as_json
def benchmark_report_command(outs: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Models side by side: report.html, a page that fetches nothing, and report.md, a table.

    OUT is an --out folder of alignkd benchmark run. The page has scores with 95 % intervals, the papers' average, published
    figures, each pair of models on the questions they share, categories, questions on which models differ with their
    pictures, and all settings, with a warning where they differ.

    \b
    Example:
      alignkd benchmark report scores-sft scores-align-kd --to compared
    """
    config = from_options(BenchmarkReportConfig, given, outs=outs)
    from alignkd.pipeline.report.benchmarks.report import benchmark_report, figures_in_words
    from alignkd.pipeline.runtime.redact import redacted

    figures = redacted(benchmark_report(config))
    if as_json:
        say_json(figures)
    else:
        say(figures_in_words(figures))
