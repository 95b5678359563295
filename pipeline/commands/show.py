"""``alignkd show``."""

from typing import Any

import click

from alignkd.extras import require
from alignkd.pipeline.commands.options import job_command as options
from alignkd.pipeline.commands.options.from_config import from_options, options_of
from alignkd.pipeline.commands.output.printing import print_figures, say, say_json
from alignkd.pipeline.config.show import ShowConfig
from alignkd.pipeline.runtime.printable import printable


@click.command("show", cls=options.JobCommand, short_help="One sample as the model sees it.")
@options_of(ShowConfig)
@options.as_json
def show_command(as_json: bool, **given: Any) -> None:
    """One sample as the model sees it: its tokens, and where the text looks.

    \b
    Example:
      alignkd show --model MobileVLM_V2-1.7B --data train.json --images images --id 000123 --plot attention.png
    """
    config = from_options(ShowConfig, given)
    if config.plot is not None:
        require("matplotlib", "--plot")
    from alignkd.pipeline.evaluate.show_sample import show

    shown = show(config)
    if as_json:
        say_json({**shown.figures, "tokens": shown.tokens})
        return
    say("position      id  place         supervised  piece")
    for token in shown.tokens:
        mark = "yes" if token["supervised"] else ""
        say(f"{token['position']:8d}  {token['id']:6d}  {token['place']:<12}  {mark:<10}  {printable(token['piece'])}")
    print_figures(shown.figures, as_json=False)
