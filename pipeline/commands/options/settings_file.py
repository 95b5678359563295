"""``--settings``: defaults of a command's options from a file, each checked as if it were typed."""

from collections.abc import Iterator, Mapping
from typing import Any

import click

from alignkd.errors import ConfigError
from alignkd.pipeline.config.presets import did_you_mean, read_settings

SETTINGS = "alignkd.settings"
"""The key of a context's ``meta`` that has the settings file that was given."""


def use_settings(ctx: click.Context, param: click.Parameter, value: str | None) -> None:  # noqa: ARG001
    """Click's callback: make the values of the settings file the defaults of this command's options."""
    if value is None:
        return
    ctx.meta[SETTINGS] = value
    name = command_name(ctx)
    ctx.default_map = _as_defaults(ctx, name, f"--settings {value}", _section(ctx, value, name))


def settings_of(ctx: click.Context, settings: str) -> dict[str, Any]:
    """The section of a context's command, its values as they stand in the file; they are checked as if they were typed.

    Raises:
        ConfigError: an unknown option, or a value of the wrong type or range.
    """
    name = command_name(ctx)
    values = _section(ctx, settings, name)
    _as_defaults(ctx, name, f"--settings {settings}", values)
    return values


def _section(ctx: click.Context, settings: str, name: str) -> dict[str, Any]:
    return read_settings(settings, name, known=lambda: sorted(_all_commands(ctx.find_root()), key=str))


def command_name(ctx: click.Context) -> str:
    """The name of a command as a user types it, ``cache status``: the name of its section in a settings file."""
    words = [str(ctx.command.name)]
    while ctx.parent is not None and ctx.parent.parent is not None:
        ctx = ctx.parent
        words.insert(0, str(ctx.command.name))
    return " ".join(words)


def _all_commands(ctx: click.Context, *before: str) -> Iterator[str]:
    if not isinstance(ctx.command, click.Group):
        yield " ".join(before) or str(ctx.command.name)
        return
    for name in ctx.command.list_commands(ctx):
        command = ctx.command.get_command(ctx, name)
        assert command is not None
        yield from _all_commands(click.Context(command, parent=ctx), *before, name)


def _as_defaults(ctx: click.Context, command: str, where: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a settings file by click's parameter names.

    Raises:
        ConfigError: an unknown option, one that a command line cannot undo, the same one twice, or a value of the wrong type
            or range.
    """
    usable = [p for p in ctx.command.params if isinstance(p, click.Option) and _can_be_undone(p)]
    options = {name.lstrip("-"): option for option in usable for name in option.opts}
    unknown = [name for name in values if name not in options]
    if unknown:
        shown = ", ".join(option.opts[0].lstrip("-") for option in usable)
        meant = did_you_mean(unknown, options)
        raise ConfigError(f"{where}: {', '.join(unknown)} cannot be set for {command}{meant}; known are {shown}")
    defaults: dict[str, Any] = {}
    names: dict[str, str] = {}
    for name, value in values.items():
        option = options[name]
        assert option.name is not None
        if names.setdefault(option.name, name) != name:
            raise ConfigError(f"{where}: {names[option.name]} and {name} are one option; set one of them")
        given = value if isinstance(value, list) and option.multiple else [value]
        accepted = bool if option.is_flag else (str, int, float)
        if not all(isinstance(one, accepted) and isinstance(one, bool) == option.is_flag for one in given):
            expected = "true or false" if option.is_flag else "a text or a number"
            raise ConfigError(f"{where}: {name} is {value!r}, expected {expected}")
        words = given if option.is_flag else [str(one) for one in given]
        defaults[option.name] = words if option.multiple else words[0]
        try:
            option.type_cast_value(ctx, defaults[option.name])
        except click.BadParameter as error:
            raise ConfigError(f"{where}: {name}: {error.message}") from error
    return defaults


def _can_be_undone(option: click.Option) -> bool:
    return option.expose_value and (not option.is_flag or bool(option.secondary_opts))
