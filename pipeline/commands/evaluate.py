"""``alignkd evaluate``."""

from typing import Any

import click

from alignkd.pipeline.commands.options import job_command as options
from alignkd.pipeline.commands.options.from_config import from_options, options_of
from alignkd.pipeline.commands.output.printing import print_figures
from alignkd.pipeline.config.evaluate import EvaluateConfig


@click.command("evaluate", cls=options.JobCommand)
@options_of(EvaluateConfig)
@options.as_json
def evaluate_command(as_json: bool, **given: Any) -> None:
    """Accuracy of a model on a question file, by generation.

    The last answer of each conversation is generated and compared with the one in the file.

    \b
    Example:
      alignkd evaluate --model run/student --data test.json --images images --out run/test
    """
    config = from_options(EvaluateConfig, given)
    from alignkd.pipeline.evaluate.runner import evaluate

    print_figures(evaluate(config), as_json)
