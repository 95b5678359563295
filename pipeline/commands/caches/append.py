"""``alignkd cache append``."""

from typing import Any

import click
from click.core import ParameterSource

from alignkd.pipeline.commands.cache_teacher import stage_one_options, write_cache
from alignkd.pipeline.commands.options import job_command as options
from alignkd.pipeline.commands.options.from_config import from_options
from alignkd.pipeline.config.cache_teacher import CacheTeacherConfig


@click.command("append", cls=options.JobCommand, short_help="Run the teacher over samples that the cache lacks.")
@stage_one_options
def cache_append(**given: Any) -> None:
    """Add the samples of --data that a cache lacks: the teacher runs over those alone.

    Settings that are not given are those of the cache, whatever their default; others are refused. The data may be the new
    samples, or old and new ones. Run the same command again after an interruption; any number of workers may run it at once.

    \b
    Example:
      alignkd cache append --cache cache --teacher MobileVLM_V2-7B --data more.json --images images
    """
    from alignkd.pipeline.cache_admin.cache_settings import settings_of_cache

    ctx = click.get_current_context()
    kept = settings_of_cache(given["cache"]).items()
    taken = {name: value for name, value in kept if ctx.get_parameter_source(name) is ParameterSource.DEFAULT}
    write_cache(from_options(CacheTeacherConfig, {**given, **taken}, append=True), given)
