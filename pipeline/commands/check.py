"""``alignkd check``."""

from typing import Any

import click

from alignkd.pipeline.commands.options import job_command as options
from alignkd.pipeline.commands.options.from_config import from_options, options_of
from alignkd.pipeline.commands.output.printing import say_json
from alignkd.pipeline.config.check import CheckConfig


@click.command("check", cls=options.JobCommand)
@options_of(CheckConfig)
@options.as_json
def check_command(as_json: bool, **given: Any) -> None:
    """Find everything that is wrong with data, in one pass.

    Which samples cannot be used and why, how long they are, what their images are, which are duplicates. With --model a sample
    is judged as cache-teacher judges it, without running the model. Nothing is written. Exit code 2: no sample can be used.

    \b
    Example:
      alignkd check --data train.json --images images --model MobileVLM_V2-7B
    """
    config = from_options(CheckConfig, given)
    from alignkd.pipeline.check.run import check

    figures = check(config)
    if as_json:
        say_json(figures)
    else:
        from alignkd.pipeline.commands.output.check_tables import print_check

        print_check(figures)
    if not figures["usable"]:
        from alignkd.pipeline.data.rejected_samples import NoUsableSampleError

        raise NoUsableSampleError(
            f"none of {figures['samples']:,} samples can be used; the first reason: {figures['reasons'][0]['reason']}. Check"
            " --images and the data"
        )
