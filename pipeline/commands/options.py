"""The options that commands share, and ``--settings``, which gives a command's options defaults from a file.

The door imports this at once: nothing heavy may be imported here but inside functions.
"""

import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

_Command = TypeVar("_Command", bound=Callable[..., Any])

DTYPES = click.Choice(["float32", "bfloat16", "float16"])
FORMATS = click.Choice(["zarr", "webdataset"])
# zarr 3, which the zarr format is, begins with Python 3.11.
DEFAULT_FORMAT = "zarr" if sys.version_info >= (3, 11) else "webdataset"


def group(*decorators: Callable[[Any], Any]) -> Callable[[_Command], _Command]:
    """Several options as one decorator, in the order in which help shows them."""

    def apply(command: _Command) -> _Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


def switch(name: str, words: str) -> Callable[[_Command], _Command]:
    """``--name/--no-name``, off by default: a command line can undo what a settings file says."""
    return click.option(f"--{name}/--no-{name}", default=False, help=words)


class CommandWithSettings(click.Command):
    """Reads ``--settings`` before it answers ``--help``, wherever they stand: help shows the defaults in force."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Click's hook: ``args`` are the command's own."""
        return super().parse_args(ctx, sorted(args, key=lambda word: word in ctx.help_option_names))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Click's hook: where settings give a default, the usual one that the text names is left out."""
        records = [record for option in self.get_params(ctx) if (record := option.get_help_record(ctx))]
        with formatter.section("Options"):
            formatter.write_dl([(name, re.sub(r" \[default: [^]]*\](?=  \[default: )", "", words)) for name, words in records])


def _use_settings(ctx: click.Context, param: click.Parameter, value: str | None) -> None:  # noqa: ARG001
    if value is None:
        return
    from alignkd.pipeline.config.presets import read_settings

    assert ctx.command.name is not None
    ctx.default_map = _as_defaults(ctx, f"--settings {value}", read_settings(value, ctx.command.name))


def _as_defaults(ctx: click.Context, where: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a settings file by parameter, as a command line would give them.

    Raises:
        ValueError: an option that is not known or that a command line could not undo, or a value that is not one.
    """
    options = {_long_name(p): p for p in ctx.command.params if isinstance(p, click.Option) and _can_be_undone(p)}
    unknown = [name for name in values if name not in options]
    if unknown:
        raise ValueError(f"{where}: {', '.join(unknown)} cannot be set for {ctx.command.name}; known are {', '.join(options)}")
    defaults: dict[str, Any] = {}
    for name, value in values.items():
        option = options[name]
        given = value if isinstance(value, list) and option.multiple else [value]
        accepted = bool if option.is_flag else (str, int, float)
        if not all(isinstance(one, accepted) and isinstance(one, bool) == option.is_flag for one in given):
            expected = "true or false" if option.is_flag else "a text or a number"
            raise ValueError(f"{where}: {name} is {value!r}, expected {expected}")
        words = given if option.is_flag else [str(one) for one in given]
        assert option.name is not None
        defaults[option.name] = words if option.multiple else words[0]
        try:
            option.type_cast_value(ctx, defaults[option.name])
        except click.BadParameter as error:
            raise ValueError(f"{where}: {name}: {error.message}") from error
    return defaults


def _long_name(option: click.Option) -> str:
    return max(option.opts, key=len).lstrip("-")


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
data = group(
    click.option("--data", required=True, help="LLaVA-format JSON or JSON lines."),
    click.option("--images", help="Folder that image paths are relative to."),
)
machine = group(
    click.option("--device", help="cpu, cuda, cuda:1 ... [default: the GPU where there is one]"),
    click.option("--vision-tower", help="Local folder of the CLIP tower, where the checkpoint names none that is here."),
)
template = click.option("--template", help="Prompt template. [default: the model's]")
max_rejected = click.option(
    "--max-rejected", default=100, show_default=True, help="Stop when more samples than this cannot be used."
)
