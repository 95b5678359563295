"""The sections of a settings file for commands that a job runs, checked before it begins."""

from pathlib import Path
from typing import Any

import click

from alignkd.errors import ConfigError
from alignkd.pipeline.commands.options.settings_file import SETTINGS, settings_of
from alignkd.pipeline.config.presets import section_names
from alignkd.pipeline.config.rounds import SECTIONS

_REQUIRED = (("cache-teacher", "teacher"), ("distill", "student"))


def checked_sections(ctx: click.Context) -> tuple[str, dict[str, dict[str, Any]]]:
    """The settings file that was given, and its sections for :data:`SECTIONS`: what is wrong there ends no step hours later.

    Raises:
        ConfigError: no file, an option that no default gives, an unknown one, or a value of the wrong type or range.
    """
    settings: str | None = ctx.meta.get(SETTINGS)
    if settings is None:
        raise ConfigError(
            "alignkd rounds takes the options of its commands from --settings FILE.yaml, with the sections rounds,"
            " cache-teacher (with teacher), distill (with student) and, if wanted, answer; docs/rounds.md has one"
        )
    root = ctx.find_root()
    assert isinstance(root.command, click.Group)
    found = dict[str, dict[str, Any]]()
    for name in SECTIONS:
        command = root.command.get_command(root, name)
        assert command is not None
        if name in section_names(settings):
            found[name] = settings_of(click.Context(command, info_name=name, parent=root), settings)
    for name, option in _REQUIRED:
        if not isinstance(found.get(name, {}).get(option), str):
            raise ConfigError(f"--settings {settings}: section {name} has no {option}: give the folder of its checkpoint")
    return str(Path(settings).absolute()), found
