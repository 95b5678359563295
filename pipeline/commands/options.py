"""``--settings``, which sets defaults of a command's options from a file; and the options that reports share."""

from collections.abc import Mapping
from typing import Any

import click

from alignkd.errors import ConfigError
from alignkd.pipeline.commands.grouped_help import write_sections


class CommandWithSettings(click.Command):
    """Reads ``--settings`` before it answers ``--help``, in any order: help shows the defaults of the settings file."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Click's hook: ``args`` are the command's own."""
        return super().parse_args(ctx, sorted(args, key=lambda word: word in ctx.help_option_names))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Click's hook."""
        write_sections(self.get_params(ctx), ctx, formatter)


def _use_settings(ctx: click.Context, param: click.Parameter, value: str | None) -> None:  # noqa: ARG001
    if value is None:
        return
    from alignkd.pipeline.config.presets import read_settings

    assert ctx.command.name is not None
    ctx.default_map = _as_defaults(ctx, f"--settings {value}", read_settings(value, ctx.command.name))


def _as_defaults(ctx: click.Context, where: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a settings file by click's parameter names.

    Raises:
        ConfigError: an unknown option, one that a command line cannot undo, or a value of the wrong type or range.
    """
    options = {_long_name(p): p for p in ctx.command.params if isinstance(p, click.Option) and _can_be_undone(p)}
    unknown = [name for name in values if name not in options]
    if unknown:
        raise ConfigError(f"{where}: {', '.join(unknown)} cannot be set for {ctx.command.name}; known are {', '.join(options)}")
    defaults: dict[str, Any] = {}
    for name, value in values.items():
        option = options[name]
        given = value if isinstance(value, list) and option.multiple else [value]
        accepted = bool if option.is_flag else (str, int, float)
        if not all(isinstance(one, accepted) and isinstance(one, bool) == option.is_flag for one in given):
            expected = "true or false" if option.is_flag else "a text or a number"
            raise ConfigError(f"{where}: {name} is {value!r}, expected {expected}")
        words = given if option.is_flag else [str(one) for one in given]
        assert option.name is not None
        defaults[option.name] = words if option.multiple else words[0]
        try:
            option.type_cast_value(ctx, defaults[option.name])
        except click.BadParameter as error:
            raise ConfigError(f"{where}: {name}: {error.message}") from error
    return defaults


def _long_name(option: click.Option) -> str:
    return option.opts[0].lstrip("-")


def _can_be_undone(option: click.Option) -> bool:
    return option.expose_value and (not option.is_flag or bool(option.secondary_opts))


settings = click.option(
    "--settings",
    metavar="NAME|FILE.yaml",
    is_eager=True,
    expose_value=False,
    callback=_use_settings,
    help="Defaults of other options: pretrain-short, pretrain-long, tune-short, tune-long, or a FILE.yaml.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print figures as JSON on standard output.")
