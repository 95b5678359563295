"""``alignkd chat``."""

from typing import Any

import click

from alignkd.pipeline.commands.options import job_command as options
from alignkd.pipeline.commands.options.from_config import from_options, options_of
from alignkd.pipeline.commands.output.messages import message_text
from alignkd.pipeline.commands.output.printing import say_json
from alignkd.pipeline.config.chat import ChatConfig
from alignkd.pipeline.runtime.printable import printable


@click.command("chat", cls=options.CommandWithSettings, short_help="Ask a model about a picture.")
@click.argument("model")
@options_of(ChatConfig)
@options.as_json
def chat_command(model: str, as_json: bool, **given: Any) -> None:
    """Ask a model (a student, a teacher) one question about a picture, or several in a row.

    Without --prompt, questions are read from the terminal or from a pipe, one a line. Answers go to standard output as they
    are written, everything else to standard error. Without --image the conversation is about text alone.

    \b
    Example:
      alignkd chat run/student --image cat.jpg --prompt "What is it?" --prompt "Which colour does it have?"
    """
    config = from_options(ChatConfig, given, model=model)
    from alignkd.pipeline.evaluate.chat.session import Screen, chat

    chat(
        config,
        Screen(
            piece=(lambda _: None) if as_json else (lambda text: click.echo(printable(text, keep="\n\t"), nl=False)),
            answered=(lambda answered: say_json(answered.figures)) if as_json else (lambda _: click.echo()),
            note=lambda text: click.echo(message_text(text), err=True),
        ),
    )
