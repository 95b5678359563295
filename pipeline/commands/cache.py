"""``alignkd cache``: look after a cache. None of them but ``rank`` and ``append`` loads a model, or torch."""

import dataclasses
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import click

from alignkd.errors import ConfigError, DataError
from alignkd.extras import require
from alignkd.pipeline.commands.cache_rank import cache_rank
from alignkd.pipeline.commands.options import job_command as options
from alignkd.pipeline.commands.options.lazy import LazyCommands
from alignkd.pipeline.commands.output.messages import message_text
from alignkd.pipeline.commands.output.printing import print_figures, say, say_json, without_credentials
from alignkd.pipeline.config.shared import SHARD_FORMATS
from alignkd.pipeline.runtime.printable import json_text

if TYPE_CHECKING:
    from alignkd.cache_store.protocol.reader import CacheReader
    from alignkd.cache_store.rows.row import Row
    from alignkd.pipeline.data.row_source import RowSource

_ANY_REASON = "any"


class _Subcommands(LazyCommands, options.CommandGroup):
    modules: ClassVar[Mapping[str, str]] = {
        "append": "caches.append:cache_append",
        "merge": "caches.merge:cache_merge",
        "subset": "caches.subset:cache_subset",
    }


@click.group("cache", cls=_Subcommands)
def cache() -> None:
    """Look into a cache: its progress, its soundness, its rows. Add to it, join it with others, take a part."""


cache.add_command(cache_rank)


@cache.command("status", short_help="Progress: what is done and left, at which rate, by whom.")
@click.argument("url")
@click.option(
    "--rejected", "rejected_file", type=click.Path(), help="Write every rejected sample and its reason to a JSONL file."
)
@click.option("--watch", is_flag=True, help="Show it again and again, until the cache is complete or you press Ctrl-C.")
@click.option("--every", type=click.FloatRange(min=0.1), default=5.0, help="Seconds between two looks of --watch.")
@options.as_json
def cache_status(url: str, rejected_file: str | None, watch: bool, every: float, as_json: bool) -> None:
    """Progress: samples done, left and rejected, rate and time left, each worker, and bytes. It may be running.

    "uncompressed": all of attention and vision tokens, and logits over the whole vocabulary, in 16 bits.

    \b
    Example:
      alignkd cache status cache --rejected rejected.jsonl
      alignkd cache status s3://bucket/cache --watch
    """
    from alignkd.pipeline.cache_admin.status import figures_at

    figures = figures_at(url)
    if rejected_file is not None:
        with open(rejected_file, "w", encoding="utf-8") as file:
            file.writelines(json_text(sample) + "\n" for sample in figures.get("rejected", []))
    _show_status(figures, as_json)
    while watch and not figures["complete"]:
        time.sleep(every)
        figures = figures_at(url)
        if not as_json:
            click.clear()  # nothing where standard output is no terminal
        _show_status(figures, as_json)


def _show_status(figures: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_figures(figures, as_json)
    else:
        from alignkd.pipeline.commands.output.status_table import print_status

        print_status(without_credentials(figures))


@cache.command("verify", cls=options.JobCommand)
@click.argument("url")
@click.option("--quick", is_flag=True, help="Compare records and sizes only; no content digest.")
@options.as_json
def cache_verify(url: str, quick: bool, as_json: bool) -> None:
    """Audit a cache; the last line is a digest of its content.

    The digest covers every row's key and values, whatever the sharding, order, time or format. Exit code 2 when anything
    is wrong.

    \b
    Example:
      alignkd cache verify cache
    """
    from alignkd.pipeline.cache_admin.audit import verify_with_progress

    report = verify_with_progress(url, quick=quick)
    figures = dataclasses.asdict(report) | {"incomplete": report.incomplete}
    if as_json:
        say_json(figures)
    else:
        print_figures({k: v for k, v in figures.items() if k not in ("problems", "content_sha256")}, as_json=False)
        for problem in report.problems:
            say(f"problem: {problem}")
        say(f"content sha256: {report.content_sha256 or '(not computed: --quick)'}")
    if report.problems:
        sys.exit(2)


@cache.command("repair", cls=options.JobCommand, short_help="Drop what verify finds wrong.")
@click.argument("url")
@click.option(
    "--min-age",
    type=click.FloatRange(min=0),
    default=3600.0,
    help="Seconds; younger strays stay, as a running worker may be about to commit them.",
)
@click.option(
    "--retry-rejected",
    "retry",
    is_flag=False,
    flag_value=_ANY_REASON,
    metavar="[REASON]",
    help="Try rejected samples again: all, or those of a reason that alignkd cache status counts, such as 'image missing'.",
)
@options.as_json
def cache_repair(url: str, min_age: float, retry: str | None, as_json: bool) -> None:
    """Drop everything that verify finds wrong, and sweep what crashes left; cache-teacher then rebuilds what is missing.

    With --retry-rejected, cache-teacher makes the shards of rejected samples again. Until then their rows stay as they are.

    \b
    Example:
      alignkd cache repair cache
      alignkd cache repair cache --retry-rejected "image missing"
    """
    from alignkd.cache_store.protocol.maintenance.repair import repair
    from alignkd.cache_store.rows.reasons import in_words

    report = repair(url, min_age_s=min_age, retry=_reasons(retry))
    if as_json:
        say_json(dataclasses.asdict(report))
        return
    for problem in report.problems:
        say(f"problem: {problem}")
    for name in report.removed:
        say(f"removed: {name}")
    if retry is not None:
        say(f"rejected samples to try again: {in_words(report.samples_to_retry)}")
    say(f"shards to do: {report.shards_to_do}" + ("; run alignkd cache-teacher again" if report.shards_to_do else ""))


def _reasons(given: str | None) -> list[str] | None:
    """The classes of reasons that ``--retry-rejected`` names, separated by commas; none for all of them.

    Raises:
        ConfigError: no such class.
    """
    from alignkd.cache_store.rows.reasons import REASONS

    if given is None or given == _ANY_REASON:
        return None if given is None else []
    chosen = [word.strip() for word in given.split(",")]
    if unknown := [word for word in chosen if word not in REASONS]:
        raise ConfigError(f"--retry-rejected {unknown[0]!r}: known reasons are {', '.join(REASONS)}")
    return chosen


@cache.command("convert", cls=options.JobCommand, short_help="Copy a cache into the other shard format.")
@click.argument("source")
@click.argument("target")
@click.option(
    "--format",
    "shard_format",
    type=click.Choice(SHARD_FORMATS),
    help="Format of the target. [default: the one the source is not]",
)
@options.as_json
def cache_convert(source: str, target: str, shard_format: str | None, as_json: bool) -> None:
    """Copy a cache into the other shard format; the content sha256 stays the same. Resumes where it stopped.

    \b
    Example:
      alignkd cache convert cache s3://bucket/cache
    """
    from alignkd.pipeline.cache_admin.audit import convert_with_progress
    from alignkd.pipeline.cache_admin.status import status_figures

    print_figures(status_figures(convert_with_progress(source, target, shard_format)), as_json)


def _source(reader: "CacheReader", row: "Row", data: str | None, images: str | None) -> "RowSource | None":
    """What a row was made from; None, with a warning, where only the cache's own records say where that is, and it is not.

    Raises:
        DataError: ``data`` or ``images`` are not what the row was made from.
    """
    from alignkd.pipeline.cache_admin.row import recorded_inputs, turns_images
    from alignkd.pipeline.data.row_source import find_source

    missing: DataError | None = None
    for recorded in recorded_inputs(reader) or [("", None)]:  # several where samples were appended
        chosen = data or recorded[0], images or recorded[1]
        if not chosen[0]:
            continue
        try:
            return find_source(chosen[0], chosen[1], row.key, row.image_sha256, turned=turns_images(reader))
        except DataError as error:
            missing = error
    missing = missing or DataError("the cache does not say which data it was written from")
    if data or images:
        raise missing
    message = f"warning: the image and the text are not drawn: {missing}. Give --data and --images"
    click.echo(message_text(message), err=True)
    return None


@cache.command("inspect", short_help="One row, decoded; or what the cache holds.")
@click.argument("url")
@click.option("--id", "sample_id", help="Decode the row of this sample.")
@click.option("--save", help="Write the row's arrays to an .npz file.")
@click.option("--plot", help="Draw the row's attention to a .png file.")
@click.option("--data", help="For --plot: the data file of the cache. [default: the one it was written from]")
@click.option("--images", help="For --plot: the folder of its images. [default: the one it was written from]")
@options.as_json
def cache_inspect(
    url: str, sample_id: str | None, save: str | None, plot: str | None, data: str | None, images: str | None, as_json: bool
) -> None:
    """The specification and fingerprint, or one row decoded, in words and as a picture.

    \b
    Example:
      alignkd cache inspect cache --id 000123 --save row.npz --plot row.png
    """
    from alignkd.cache_store.protocol.reader import CacheReader

    if plot:
        require("matplotlib", "--plot")
    reader = CacheReader(url)
    if sample_id is None:
        if save or plot:
            raise ConfigError("--save and --plot need --id: they are about one row")
        specification = {"shard_format": reader.shard_format, **reader.spec.to_dict()}
        click.echo(json_text(specification, indent=None if as_json else 2))
        return
    from alignkd.pipeline.cache_admin.row import find_row, plot_row, row_arrays, row_figures
    from alignkd.pipeline.runtime.files import save_arrays

    row = find_row(reader, sample_id)
    if save:
        save_arrays(save, row_arrays(reader, row))
    if plot:
        source = _source(reader, row, data, images)
        plot_row(reader, row, plot, *((source.pictures, source.text) if source else ()))
    print_figures(row_figures(reader, row), as_json)
