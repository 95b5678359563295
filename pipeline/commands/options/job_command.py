"""The commands' classes: ``--settings`` for all, the log for those that work for long; and ``--json``, which reports share."""

from typing import Any

import click

from alignkd.pipeline.commands.options.from_config import from_options, parameters_of
from alignkd.pipeline.commands.options.grouped_help import GroupedOption, write_sections
from alignkd.pipeline.commands.options.settings_file import use_settings
from alignkd.pipeline.config.log import LogConfig
from alignkd.pipeline.config.presets import SHIPPED

as_json = click.option("--json", "as_json", is_flag=True, help="Print figures as JSON on standard output.")


class CommandWithSettings(click.Command):
    """Reads ``--settings`` before it answers ``--help``, in any order: help shows the defaults of the settings file."""

    def __init__(self, *args: Any, **declared: Any) -> None:
        super().__init__(*args, **declared)
        self.params.append(
            GroupedOption(
                ["--settings"],
                metavar="NAME|FILE.yaml",
                is_eager=True,
                expose_value=False,
                callback=use_settings,
                help=f"Defaults of other options: {', '.join(SHIPPED)}, or a FILE.yaml.",
            )
        )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Click's hook: ``args`` are the command's own."""
        return super().parse_args(ctx, sorted(args, key=lambda word: word in ctx.help_option_names))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Click's hook."""
        write_sections(self.get_params(ctx), ctx, formatter)


class JobCommand(CommandWithSettings):
    """A command that works for long: it logs, with the options of :class:`~alignkd.pipeline.config.log.LogConfig`."""

    def __init__(self, *args: Any, **declared: Any) -> None:
        super().__init__(*args, **declared)
        self.params += parameters_of(LogConfig)

    def invoke(self, ctx: click.Context) -> Any:
        """Click's hook: the log begins before the job, and ends after its error, if any, is in it."""
        from alignkd.pipeline.runtime.logs import start_logging, worker_of_log

        given = {name: ctx.params.pop(name) for name in LogConfig.__dataclass_fields__}
        worker = worker_of_log(ctx.params.get("rank"), ctx.params.get("world_size"))
        ctx.find_root().call_on_close(start_logging(from_options(LogConfig, given), worker))
        return super().invoke(ctx)


class CommandGroup(click.Group):
    """A group whose commands take ``--settings``."""

    command_class = CommandWithSettings
