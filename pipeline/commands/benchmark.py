"""``alignkd benchmark``: the names of its commands, and the module that each is in. Nothing is imported until it is used."""

from importlib import import_module

import click

from alignkd.pipeline.commands.options import job_command as options

_COMMANDS = {
    "run": "benchmark_run:benchmark_run_command",
    "score": "benchmark_score:benchmark_score_command",
    "report": "benchmark_report:benchmark_report_command",
}
"""``module:function`` in :mod:`alignkd.pipeline.commands`, in the order that ``--help`` shows."""


class _Subcommands(options.CommandGroup):
    def list_commands(self, ctx: click.Context) -> list[str]:
        """Click's hook."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Click's hook."""
        if cmd_name not in _COMMANDS:
            return None
        module, _, name = _COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(import_module(f"alignkd.pipeline.commands.{module}"), name)
        return command


@click.group("benchmark", cls=_Subcommands)
def benchmark() -> None:
    """Score models on GQA, ScienceQA-IMG, TextVQA, MME, MMBench and POPE, from the official files."""
