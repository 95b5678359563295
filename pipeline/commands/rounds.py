"""``alignkd rounds``."""

from typing import Any

import click

from alignkd.pipeline.commands.options import job_command as options
from alignkd.pipeline.commands.options.from_config import from_options, options_of
from alignkd.pipeline.commands.options.sections import checked_sections
from alignkd.pipeline.commands.output.printing import say, say_json
from alignkd.pipeline.commands.output.rounds import rounds_text
from alignkd.pipeline.config.rounds import RoundsConfig


@click.command("rounds", cls=options.JobCommand, short_help="Answer, cache, train, again: on-policy distillation.")
@options_of(RoundsConfig)
@options.as_json
@click.pass_context
def rounds_command(ctx: click.Context, /, as_json: bool, **given: Any) -> None:
    """Let the student answer, cache the teacher's targets for its answers, train on them, and again.

    The settings file has a section for each command that a round runs: answer, cache-teacher and distill; and one for rounds.

    \b
    Example:
      alignkd rounds --settings rounds.yaml --data train.json --images images --out rounds
    """
    config = from_options(RoundsConfig, given)
    settings, sections = checked_sections(ctx)

    from alignkd.pipeline.runtime.signals import resumable_from_the_start

    with resumable_from_the_start():
        from alignkd.pipeline.rounds.run import run_rounds

        figures = run_rounds(config, settings, sections)
    if as_json:
        say_json(figures)
    else:
        say(rounds_text(figures))
