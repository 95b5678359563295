"""Help of a command in sections: each option says which it belongs to, and the names that users of similar tools type."""

import re
from collections.abc import Iterable
from typing import Any

import click

from alignkd.settings import GROUPS

_SHORT = 2
"""An alias of this many letters is shown in help; longer ones are taken, and listed in docs/command-line.md."""


class GroupedOption(click.Option):
    """An option of a section of the help. Of its names, help shows the first and the short ones."""

    def __init__(self, *args: Any, group: str = "general", **declared: Any) -> None:
        assert group in GROUPS, group
        super().__init__(*args, **declared)
        self.group = group

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Click's hook."""
        everything = self.opts
        self.opts = [name for name in everything if name == everything[0] or len(name.lstrip("-")) <= _SHORT]
        try:
            return super().get_help_record(ctx)
        finally:
            self.opts = everything


def write_sections(options: Iterable[click.Parameter], ctx: click.Context, formatter: click.HelpFormatter) -> None:
    """One section for each group that has options. Options without a group are general; alone, they need no title."""
    sections: dict[str, list[tuple[str, str]]] = {name: [] for name in GROUPS}
    for option in options:
        if (record := option.get_help_record(ctx)) is not None:
            name, words = record
            # Where a settings file sets a default, the usual default in the help text is removed.
            words = re.sub(r" \[default: [^]]*\](?=  \[default: )", "", words)
            sections[getattr(option, "group", "general")].append((name, words))
    filled = {title: records for title, records in sections.items() if records}
    for title, records in filled.items():
        with formatter.section("Options" if len(filled) == 1 else f"{title[:1].upper()}{title[1:]}"):
            formatter.write_dl(records)
