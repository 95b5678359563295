"""``alignkd models``."""

import click

from alignkd.pipeline.commands.options import job_command as options
from alignkd.pipeline.commands.output.printing import say, say_json


@click.command("models", cls=options.CommandWithSettings)
@options.as_json
def models_command(as_json: bool) -> None:
    """List the model families, what each supports, and why not.

    \b
    Example:
      alignkd models
    """
    from alignkd.pipeline.commands.output.models_table import OTHERS, list_models, models_text

    found = list_models()
    if as_json:
        say_json({"families": found, "others": OTHERS})
    else:
        say(models_text(found))
