"""``alignkd demo``."""

from typing import Any

import click

from alignkd.pipeline.commands.options import job_command as options
from alignkd.pipeline.commands.options.from_config import from_options, options_of
from alignkd.pipeline.commands.output.printing import say, say_json
from alignkd.pipeline.config.demo import DemoConfig


@click.command("demo", cls=options.JobCommand, short_help="The whole path on easy-VQA, with a report.")
@options_of(DemoConfig)
@options.as_json
def demo_command(as_json: bool, **given: Any) -> None:
    """The whole path on easy-VQA, from image-text pairs to a distilled student, with a report.

    \b
    Example:
      alignkd demo --out demo
    """
    config = from_options(DemoConfig, given)
    from alignkd.pipeline.demo.run import demo

    result = demo(config)
    if as_json:
        say_json(result.figures)
    else:
        say(result.text)
