"""``alignkd cache subset``."""

from typing import Any

import click

from alignkd.errors import ConfigError
from alignkd.pipeline.commands.options import job_command as options
from alignkd.pipeline.commands.options.from_config import CommaSeparated, from_options, options_of
from alignkd.pipeline.commands.output.printing import print_figures
from alignkd.pipeline.config.cache_layout import ALL_TARGETS
from alignkd.pipeline.config.cache_subset import CacheSubsetConfig
from alignkd.pipeline.config.shared import SHARD_FORMATS


@click.command("subset", cls=options.JobCommand, short_help="Some samples of a cache, or some of its targets.")
@click.argument("url")
@click.argument("target", metavar="TARGET")
@options_of(CacheSubsetConfig)
@click.option("--ids", "ids_file", metavar="FILE", help="Keep the samples of these ids, one a line.")
@click.option("--keys", "keys_file", metavar="FILE", help="Keep the samples of these keys, one a line.")
@click.option("--without", type=CommaSeparated(ALL_TARGETS), help="Comma-separated targets to leave out.")
@click.option("--format", "shard_format", type=click.Choice(SHARD_FORMATS), help="Format of the target. [default: the cache's]")
@click.option("--shard-samples", type=click.IntRange(min=1), help="Samples per shard of the target. [default: the cache's]")
@options.as_json
def cache_subset(
    url: str,
    target: str,
    ids_file: str | None,
    keys_file: str | None,
    without: tuple[str, ...] | None,
    shard_format: str | None,
    shard_samples: int | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Write a part of a cache as a cache of its own: of some samples, without some targets, or both.

    Rows are copied as they are stored. Run the same command again after an interruption: it continues.

    \b
    Example:
      alignkd cache subset cache small --data small.json
      alignkd cache subset cache without-logits --without logits
    """
    from alignkd.pipeline.cache_admin.repacking import subset_with_progress
    from alignkd.pipeline.cache_admin.status import status_figures

    config = from_options(CacheSubsetConfig, {name: value for name, value in given.items() if value is not None})
    chosen = _samples(config, ids_file, keys_file)
    if not chosen and not without:
        raise ConfigError("cache subset: found none of --data, --ids, --keys and --without, expected one of them at least")
    store = subset_with_progress(url, target, shard_format, shard_samples, without=without or (), **chosen)
    print_figures(status_figures(store), as_json)


def _samples(config: CacheSubsetConfig, ids_file: str | None, keys_file: str | None) -> dict[str, Any]:
    """The keys or ids that the options name.

    Raises:
        ConfigError: two of the options.
        DataError: a file cannot be read.
    """
    given = {"--data": config.data or None, "--ids": ids_file, "--keys": keys_file}
    if len(named := [name for name, value in given.items() if value is not None]) > 1:
        raise ConfigError(f"cache subset: found {' and '.join(named)}, expected one of them")
    if config.data:
        from alignkd.pipeline.data.open_samples import open_samples

        samples = open_samples(config)
        return {"keys": samples.keys[samples.unique()]}
    from alignkd.pipeline.cache_admin.repacking import read_keys, read_lines

    if ids_file is not None:
        return {"ids": read_lines(ids_file)}
    return {"keys": read_keys(keys_file)} if keys_file is not None else {}
