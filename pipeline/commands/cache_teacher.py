"""``alignkd cache-teacher``."""

from functools import partial
from typing import Any

import click

from alignkd.pipeline.commands.options import job_command as options
from alignkd.pipeline.commands.options.from_config import from_options, options_of
from alignkd.pipeline.commands.options.grouped_help import GroupedOption
from alignkd.pipeline.commands.output.printing import print_figures
from alignkd.pipeline.config.cache_teacher import CacheTeacherConfig

_of_cluster = partial(click.option, cls=GroupedOption, group="many machines")


@click.command("cache-teacher", cls=options.JobCommand, short_help="Stage one: run the teacher once, write its targets.")
@options_of(CacheTeacherConfig)
@_of_cluster("--engine", type=click.Choice(["process", "ray"]), default="process", help="What hands out the shards.")
@_of_cluster("--ray-workers", type=click.IntRange(min=1), help="Ray actors, each with a teacher. [default: one per GPU]")
@_of_cluster("--ray-address", help="Address of a running Ray cluster. [default: the one Ray finds, or a local one]")
@click.option(
    "--dry-run", "only_estimate", is_flag=True, help="Estimate plan, size and time from a few real samples; write nothing."
)
@options.as_json
def cache_teacher_command(
    engine: str, ray_workers: int | None, ray_address: str | None, only_estimate: bool, as_json: bool, **given: Any
) -> None:
    """Stage one: run the teacher once and write its targets to a cache.

    Run the same command again after an interruption: it continues with the next shard. Any number of workers may write
    one cache: see docs/cluster.md.

    \b
    Example:
      alignkd cache-teacher --teacher MobileVLM_V2-7B --data train.json --images images --cache cache --dtype bfloat16
    """
    from alignkd.pipeline.runtime.signals import resumable_from_the_start

    config = from_options(CacheTeacherConfig, given)
    with resumable_from_the_start():
        if only_estimate:
            _estimate(config, as_json)
        elif engine == "ray":
            from alignkd.pipeline.stage_one.ray_workers import cache_teacher_on_ray

            print_figures(cache_teacher_on_ray(config, workers=ray_workers, address=ray_address), as_json)
        else:
            from alignkd.pipeline.stage_one.worker import cache_teacher

            print_figures(cache_teacher(config), as_json)


def _estimate(config: CacheTeacherConfig, as_json: bool) -> None:
    from alignkd.cache_store.storage import open_storage
    from alignkd.pipeline.stage_one.checks.place import check_room
    from alignkd.pipeline.stage_one.dry_run import dry_run

    figures = dry_run(config)
    print_figures(figures, as_json)
    check_room(open_storage(config.cache), figures["bytes"])
