"""Click options from a configuration: names, types, ranges, defaults and help are declared once, in the dataclass."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import click

from alignkd.pipeline.commands.options.grouped_help import GroupedOption
from alignkd.settings import Setting, Settings, element_type, flag_of, setting_of, types_of

_Command = TypeVar("_Command", bound=Callable[..., Any])
_Config = TypeVar("_Config", bound=Settings)


def options_of(config: type[Settings]) -> Callable[[_Command], _Command]:
    """Every setting of a configuration as an option, nested configurations included, in the order of the fields."""

    def apply(command: _Command) -> _Command:
        for option in reversed(list(_options(config))):
            command = option(command)
        return command

    return apply


def parameters_of(config: type[Settings]) -> list[click.Parameter]:
    """The options of :func:`options_of`, for a command that is not made by decorators."""

    def holder() -> None:
        """What click's decorators leave their options on."""

    found: list[click.Parameter] = options_of(config)(holder).__click_params__  # type: ignore[attr-defined]
    return found[::-1]


def from_options(config: type[_Config], given: Mapping[str, Any], **others: Any) -> _Config:
    """The configuration of parsed options; ``others`` are fields that are not options.

    Raises:
        ConfigError: settings that are out of range or contradict each other.
    """
    values = dict(others)
    for field in _settings(config):
        declared = setting_of(field)
        assert declared is not None
        if declared.nested:
            values[field.name] = from_options(_nested(config, field), given)
        elif field.name in given:
            values[field.name] = given[field.name]
    return config(**values)


def _settings(config: type[Settings]) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(config) if setting_of(field) is not None]


def _nested(config: type[Settings], field: dataclasses.Field[Any]) -> type[Any]:
    (kind,) = types_of(config)[field.name]
    return kind


def _options(config: type[Settings]) -> Iterator[Callable[[Any], Any]]:
    for field in _settings(config):
        declared = setting_of(field)
        assert declared is not None
        if declared.nested:
            yield from _options(_nested(config, field))
        else:
            accepted = types_of(config)[field.name]
            either = set(accepted) == {str, tuple}
            if accepted == (tuple,):
                accepted = (tuple, element_type(config, field.name))
            yield _option(field, declared, accepted, one_or_several=either)


def _one_or_several(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> str | tuple[str, ...] | None:  # noqa: ARG001
    """Click's callback of an option that may be repeated, and is a text where it is not."""
    return value[0] if len(value) == 1 else value or None


def _option(
    field: dataclasses.Field[Any], declared: Setting, accepted: tuple[type, ...], *, one_or_several: bool = False
) -> Callable[[Any], Any]:
    name, parameter = flag_of(field), field.name
    required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    words = declared.help + (f" [default: {declared.default_text}]" if declared.default_text else "")
    others = [f"--{alias}" for alias in declared.aliases]
    about: dict[str, Any] = {"cls": GroupedOption, "group": declared.group, "help": words}
    if bool in accepted:
        # A command line can undo what a settings file says, unless the option is only meant for one run.
        switch = name if declared.plain_flag else f"{name}/--no-{name.lstrip('-')}"
        return click.option(switch, parameter, is_flag=True, default=field.default, **about)
    default = None if required else field.default
    if declared.comma_separated:
        assert isinstance(field.default, tuple)
        kind, default = CommaSeparated(declared.choices), ",".join(field.default)
        return click.option(name, *others, parameter, type=kind, default=default, **about)
    return click.option(
        name,
        *others,
        parameter,
        type=_click_type(declared, accepted),
        default=default,
        required=required,
        multiple=tuple in accepted,
        callback=_one_or_several if one_or_several else None,
        metavar=declared.metavar,
        **about,
    )


def _click_type(declared: Setting, accepted: tuple[type, ...]) -> Any:
    if declared.choices:
        return click.Choice(list(declared.choices))
    if declared.or_share:
        return NumberOrShare(declared)
    if float in accepted or int in accepted:
        kind: Any = click.FloatRange if float in accepted else click.IntRange
        low, high = (
            next((limit for limit in pair if limit is not None), None)
            for pair in ((declared.at_least, declared.more_than), (declared.at_most, declared.less_than))
        )
        if low is None and high is None:
            return float if float in accepted else int
        return kind(min=low, max=high, min_open=declared.more_than is not None, max_open=declared.less_than is not None)
    return str


class CommaSeparated(click.ParamType[Any]):
    """Several of some words as one, separated by commas, to a tuple."""

    name = "text"

    def __init__(self, known: tuple[str, ...]) -> None:
        self.known = known

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Click's hook."""
        if isinstance(value, tuple):
            return value
        chosen = tuple(name.strip() for name in value.split(",") if name.strip())
        if not chosen or any(name not in self.known for name in chosen):
            self.fail(f"{value!r}: known are {', '.join(self.known)}", param, ctx)
        return chosen


class NumberOrShare(click.ParamType[Any]):
    """A whole number, or a share in per cent, which stays text."""

    name = "text"

    def __init__(self, declared: Setting) -> None:
        self.declared = declared

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Click's hook."""
        text = str(value).replace(" ", "")
        given = int(text) if text.isascii() and text.isdecimal() else text
        if expected := self.declared.refusal(given):
            self.fail(f"{value!r} is not {expected}", param, ctx)
        return given
