"""Groups of commands that import a command when it is asked for."""

from collections.abc import Mapping
from importlib import import_module
from typing import ClassVar

import click


class LazyCommands(click.Group):
    """A group whose commands are in modules of :mod:`alignkd.pipeline.commands`."""

    modules: ClassVar[Mapping[str, str]]
    """``module:function`` of each command, in the order that ``--help`` shows."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Click's hook."""
        return list(self.modules)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Click's hook."""
        if cmd_name not in self.modules:
            return None
        module, _, name = self.modules[cmd_name].partition(":")
        command: click.Command = getattr(import_module(f"alignkd.pipeline.commands.{module}"), name)
        return command
