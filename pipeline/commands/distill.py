"""``alignkd distill``."""

import contextlib
import sys
from typing import Any

import click

from alignkd.errors import ConfigError
from alignkd.losses.recipes import RECIPES, get_recipe
from alignkd.pipeline.commands.options import job_command as options
from alignkd.pipeline.commands.options.from_config import from_options, options_of
from alignkd.pipeline.commands.options.grouped_help import GroupedOption
from alignkd.pipeline.commands.output.printing import say, say_json
from alignkd.pipeline.config.distill import DistillConfig
from alignkd.pipeline.runtime.signals import resumable_from_the_start
from alignkd.plugins import load_plugins


@click.command("distill", cls=options.JobCommand, short_help="Stage two: train the student, without the teacher.")
@click.option(
    "--recipe",
    cls=GroupedOption,
    group="targets",
    default=DistillConfig.recipe.name,
    help=f"{', '.join(RECIPES)} (see docs/method.md), or a FILE.yaml.",
)
@click.option(
    "--set",
    "overrides",
    cls=GroupedOption,
    group="targets",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a field of the recipe; may be repeated.",
)
@options_of(DistillConfig)
@options.as_json
def distill_command(recipe: str, overrides: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Stage two: train the student from the cache; the teacher is never loaded.

    \b
    Example:
      alignkd distill --student MobileVLM_V2-1.7B --cache cache --data train.json --images images --out run
    """
    pairs = [text.partition("=") for text in overrides]
    wrong = [text for text, (_, equals, _) in zip(overrides, pairs, strict=True) if not equals]
    if wrong:
        raise ConfigError(f"--set {wrong[0]}: expected key=value")
    load_plugins(given["plugins"])  # a plugin may register terms that --set and a recipe file name
    chosen = get_recipe(recipe, {key: value for key, _, value in pairs})
    config = from_options(DistillConfig, given, recipe=chosen)
    with resumable_from_the_start(), contextlib.redirect_stdout(sys.stderr):  # DeepSpeed logs to standard output
        from alignkd.pipeline.training.monitoring.summary import summary
        from alignkd.pipeline.training.run import distill

        figures = distill(config)
    if figures:  # of several processes, the first one reports
        if as_json:
            say_json(figures)
        else:
            say(summary(figures))
