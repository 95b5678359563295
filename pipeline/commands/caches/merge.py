"""``alignkd cache merge``."""

import click

from alignkd.pipeline.commands.options import job_command as options
from alignkd.pipeline.commands.output.printing import print_figures
from alignkd.pipeline.config.shared import SHARD_FORMATS


@click.command("merge", cls=options.JobCommand, short_help="Join caches of one teacher and one calibration.")
@click.argument("urls", nargs=-1, required=True, metavar="URL URL...")
@click.argument("target", metavar="TARGET")
@click.option("--format", "shard_format", type=click.Choice(SHARD_FORMATS), help="Format of the target. [default: the first's]")
@click.option("--shard-samples", type=click.IntRange(min=1), help="Samples per shard of the target. [default: the first's]")
@click.option("--prefer-first", is_flag=True, help="Where two caches have other targets for a sample, take the first cache's.")
@options.as_json
def cache_merge(
    urls: tuple[str, ...],
    target: str,
    shard_format: str | None,
    shard_samples: int | None,
    prefer_first: bool,
    as_json: bool,
) -> None:
    """Write several caches as one, each sample once. They may differ in their data and format, and in nothing else.

    Rows are copied as they are stored. Run the same command again after an interruption: it continues.

    \b
    Example:
      alignkd cache merge cache-a cache-b s3://bucket/cache-ab
    """
    from alignkd.pipeline.cache_admin.repacking import merge_with_progress
    from alignkd.pipeline.cache_admin.status import status_figures

    store = merge_with_progress(urls, target, shard_format, shard_samples, prefer_first=prefer_first)
    print_figures(status_figures(store), as_json)
