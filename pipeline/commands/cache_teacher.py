"""``alignkd cache-teacher``."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import click

from alignkd.pipeline.commands.options import job_command as options
from alignkd.pipeline.commands.options.from_config import from_options, options_of
from alignkd.pipeline.commands.options.grouped_help import GroupedOption
from alignkd.pipeline.commands.output.printing import print_figures
from alignkd.pipeline.config.cache_teacher import CacheTeacherConfig

_Command = TypeVar("_Command", bound=Callable[..., Any])
_of_cluster = partial(click.option, cls=GroupedOption, group="many machines")


def stage_one_options(command: _Command) -> _Command:
    """The options of stage one."""
    options_in_order = (
        options_of(CacheTeacherConfig),
        _of_cluster("--engine", type=click.Choice(["process", "ray"]), default="process", help="What hands out the shards."),
        _of_cluster(
            "--ray-workers", type=click.IntRange(min=1), help="Ray actors, each with a teacher. [default: one per GPU]"
        ),
        _of_cluster("--ray-address", help="Address of a running Ray cluster. [default: the one Ray finds, or a local one]"),
        click.option(
            "--dry-run",
            "only_estimate",
            is_flag=True,
            help="Estimate plan, size and time from a few real samples; write nothing.",
        ),
        options.as_json,
    )
    for option in reversed(options_in_order):
        command = option(command)
    return command


@click.command("cache-teacher", cls=options.JobCommand, short_help="Stage one: run the teacher once, write its targets.")
@stage_one_options
def cache_teacher_command(**given: Any) -> None:
    """Stage one: run the teacher once and write its targets to a cache.

    Run the same command again after an interruption: it continues with the next shard. Any number of workers may write
    one cache: see docs/cluster.md.

    \b
    Example:
      alignkd cache-teacher --teacher MobileVLM_V2-7B --data train.json --images images --cache cache --dtype bfloat16
    """
    write_cache(from_options(CacheTeacherConfig, given), given)


def write_cache(config: CacheTeacherConfig, given: Mapping[str, Any]) -> None:
    """Estimate or run stage one, as the options that are no settings say."""
    from alignkd.pipeline.runtime.signals import resumable_from_the_start

    as_json = given["as_json"]
    with resumable_from_the_start():
        if given["only_estimate"]:
            _estimate(config, as_json)
        elif given["engine"] == "ray":
            from alignkd.pipeline.stage_one.ray_workers import cache_teacher_on_ray

            workers, address = given["ray_workers"], given["ray_address"]
            print_figures(cache_teacher_on_ray(config, workers=workers, address=address), as_json)
        else:
            from alignkd.pipeline.stage_one.worker import cache_teacher

            print_figures(cache_teacher(config), as_json)


def _estimate(config: CacheTeacherConfig, as_json: bool) -> None:
    from alignkd.cache_store.storage import open_storage
    from alignkd.pipeline.cache_admin.room import check_room
    from alignkd.pipeline.stage_one.dry_run import dry_run

    figures = dry_run(config)
    print_figures(figures, as_json)
    check_room(open_storage(config.cache), figures["bytes"])
