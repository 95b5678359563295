"""``alignkd report``."""

from typing import Any

import click

from alignkd.pipeline.commands.options import job_command as options
from alignkd.pipeline.commands.options.from_config import from_options, options_of
from alignkd.pipeline.commands.output.printing import say, say_json
from alignkd.pipeline.config.report import ReportConfig


@click.command("report", cls=options.JobCommand, short_help="A training run, or several side by side, as a page.")
@click.argument("runs", nargs=-1, metavar="RUN...")
@options_of(ReportConfig)
@options.as_json
def report_command(runs: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """A training run, or several side by side, as one HTML page, report.html, that fetches nothing.

    RUN is a folder that alignkd distill writes to; it may still be training. The page has the loss term by term, shares,
    warnings, figures on held-out samples, throughput, memory, where the text looks before and after, sample predictions, the
    size of the cache, all settings and the command that repeats the run. What cannot be shown is named, with the reason.

    \b
    Example:
      alignkd report run --to run/report
      alignkd report run-sft run-align-kd --to compared --json
    """
    config = from_options(ReportConfig, given, runs=runs)
    from alignkd.pipeline.report.run_page import figures_in_words, report
    from alignkd.pipeline.runtime.redact import redacted

    figures = redacted(report(config))
    if as_json:
        say_json(figures)
    else:
        say(figures_in_words(figures))
