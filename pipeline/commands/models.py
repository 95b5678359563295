"""``alignkd models``."""

import json

import click


@click.command("models")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def models_command(as_json: bool) -> None:
    """List the model families, what each supports, and why not.

    \b
    Example:
      alignkd models
    """
    from alignkd.pipeline.commands.models_table import OTHERS, list_models, models_text

    found = list_models()
    click.echo(json.dumps({"families": found, "others": OTHERS}) if as_json else models_text(found))
