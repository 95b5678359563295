"""``alignkd answer``."""

from typing import Any

import click

from alignkd.pipeline.commands.options import job_command as options
from alignkd.pipeline.commands.options.from_config import from_options, options_of
from alignkd.pipeline.commands.output.answers import answers_text
from alignkd.pipeline.commands.output.printing import say, say_json
from alignkd.pipeline.config.answer import AnswerConfig


@click.command("answer", cls=options.JobCommand, short_help="Answers that a model writes to the questions of a data file.")
@options_of(AnswerConfig)
@options.as_json
def answer_command(as_json: bool, **given: Any) -> None:
    """Have a model write answers to the questions of a data file: data in the same format, for cache-teacher.

    The last answer of each conversation is written anew. A rerun continues where the last one ended, and several processes
    share the work: start the same command with torchrun or srun.

    \b
    Example:
      alignkd answer --model teacher --data train.json --images images --out answers.jsonl
    """
    config = from_options(AnswerConfig, given)
    from alignkd.pipeline.runtime.signals import resumable_from_the_start

    with resumable_from_the_start():
        from alignkd.pipeline.answer.run import answer

        figures = answer(config)
    if as_json:
        say_json(figures)
    else:
        say(answers_text(figures))
