"""The command line: the names of the commands, and the module that each is in. Nothing else is imported until it is used."""

from typing import Any

import click

from alignkd.errors import AlignkdError, is_resumable
from alignkd.pipeline.commands.options.lazy import LazyCommands
from alignkd.pipeline.commands.output.messages import log_end, make_streams_safe, shown_escaped
from alignkd.version import __version__

_COMMANDS = {
    "check": "check:check_command",
    "cache-teacher": "cache_teacher:cache_teacher_command",
    "cache": "cache:cache",
    "distill": "distill:distill_command",
    "chat": "chat:chat_command",
    "show": "show:show_command",
    "models": "models:models_command",
    "evaluate": "evaluate:evaluate_command",
    "answer": "answer:answer_command",
    "report": "report:report_command",
    "new-student": "students:new_student_command",
    "push": "students:push_command",
    "benchmark": "benchmark:benchmark",
    "rounds": "rounds:rounds_command",
    "demo": "demo:demo_command",
}


class UserError(click.ClickException):
    """One message for the user; exit code 2."""

    exit_code = 2


class TryAgainError(UserError):
    """One message; the exit code that says: run the same command again. Schedulers know it as EX_TEMPFAIL."""

    exit_code = 75


class LazyGroup(LazyCommands):
    """Imports a command when it is asked for, and turns errors that a user can act on into one message.

    An error that is neither :class:`AlignkdError` nor OSError is a bug: it keeps its traceback. Messages hold text from
    others, so they are shown with its hidden characters escaped.
    """

    modules = _COMMANDS

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Click's hook."""
        make_streams_safe()
        return super().main(*args, **kwargs)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Click's hook."""
        with shown_escaped():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Click's hook."""
        from alignkd.pipeline.runtime.signals import Interrupted

        try:
            with shown_escaped():
                return self._invoke(ctx)
        except Interrupted as stopped:
            if not log_end(stopped):
                click.echo(str(stopped), err=True)
            ctx.exit(TryAgainError.exit_code)

    def _invoke(self, ctx: click.Context) -> Any:
        from alignkd.pipeline.runtime.signals import Interrupted

        try:
            return super().invoke(ctx)
        except (BrokenPipeError, Interrupted):  # the program that read our output has ended; click ends quietly
            raise
        except (AlignkdError, OSError) as error:
            kind = TryAgainError if is_resumable(error) else UserError
            if log_end(error):
                ctx.exit(kind.exit_code)
            if ctx.find_root().params.get("debug"):
                raise
            raise kind(str(error)) from error
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            if log_end(error, bug=True):
                ctx.exit(1)
            raise


_CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "show_default": True,
    "token_normalize_func": lambda word: word.replace("_", "-"),  # --learning_rate, as transformers spells it
}


@click.group(cls=LazyGroup, context_settings=_CONTEXT)
@click.version_option(__version__, prog_name="alignkd")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:  # noqa: ARG001
    """Distil a large vision-language model into a small one, from a cache of the teacher's targets.

    \b
    Example:
      alignkd cache-teacher --teacher MobileVLM_V2-7B --data train.json --images images --cache cache
      alignkd distill --student MobileVLM_V2-1.7B --cache cache --data train.json --images images --out run
    """
    _quiet_transformers()


def _quiet_transformers() -> None:
    import os

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


if __name__ == "__main__":
    main()
