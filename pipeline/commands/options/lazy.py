"""Groups of commands that import a command when it is asked for."""

from collections.abc import Mapping
from importlib import import_module
from typing import ClassVar

import click


class LazyCommands(click.Group):
    """A group whose commands are in modules of :mod:`alignkd.pipeline.commands`, those added to the group itself come first."""

    modules: ClassVar[Mapping[str, str]]
    """``module:function`` of each command, in the order that ``--help`` shows."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Click's hook."""
        return [*super().list_commands(ctx), *self.modules]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Click's hook."""
        if cmd_name not in self.modules:
            return super().get_command(ctx, cmd_name)
        module, _, name = self.modules[cmd_name].partition(":")
        command: click.Command = getattr(import_module(f"alignkd.pipeline.commands.{module}"), name)
        return command
