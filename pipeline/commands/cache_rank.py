"""``alignkd cache rank``."""

from typing import Any

import click

from alignkd.pipeline.commands.options import job_command as options
from alignkd.pipeline.commands.options.from_config import from_options, options_of
from alignkd.pipeline.commands.output.printing import print_figures
from alignkd.pipeline.config.rank import RankConfig


@click.command("rank", cls=options.JobCommand, short_help="Samples by what they teach, to keep the best share.")
@click.argument("cache")
@options_of(RankConfig)
@options.as_json
def cache_rank(cache: str, as_json: bool, **given: Any) -> None:
    """Samples by the teacher's mean advantage, or by how far a student's answers are from the teacher's.

    A sample of high advantage is one that the teacher answers by looking. One of high divergence has most left to teach. Train
    on what is kept with the same cache.

    \b
    Example:
      alignkd cache rank cache --top 50% --data train.json --images images --out half.json
      alignkd cache rank cache --student run/student --data train.json --images images --top 10000 --out hard.json
    """
    config = from_options(RankConfig, {name: value for name, value in given.items() if value is not None}, cache=cache)
    from alignkd.pipeline.rank.rank import rank

    print_figures(rank(config), as_json)
