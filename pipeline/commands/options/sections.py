"""The sections of a settings file for commands that a job runs, checked before it begins."""

from typing import Any

import click

from alignkd.pipeline.commands.options.settings_file import SETTINGS, settings_of
from alignkd.pipeline.config.presets import section_names
from alignkd.pipeline.config.rounds import SECTIONS


def checked_sections(ctx: click.Context) -> tuple[str | None, dict[str, dict[str, Any]]]:
    """The settings file that was given, and its sections for :data:`SECTIONS`: what is wrong there ends no step hours later.

    Raises:
        ConfigError: an unknown option, or a value of the wrong type or range.
    """
    settings: str | None = ctx.meta.get(SETTINGS)
    if settings is None:
        return None, {}
    root = ctx.find_root()
    assert isinstance(root.command, click.Group)
    found = dict[str, dict[str, Any]]()
    for name in SECTIONS:
        command = root.command.get_command(root, name)
        assert command is not None
        if name in section_names(settings):
            found[name] = settings_of(click.Context(command, info_name=name, parent=root), settings)
    return settings, found
