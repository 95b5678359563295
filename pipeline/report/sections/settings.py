"""Settings that differ between runs, all settings, and the command that repeats each run."""

from collections.abc import Mapping, Sequence
from typing import Any

from alignkd.pipeline.report.page import Html, Text, details, heading, joined, preformatted, section, small, table
from alignkd.pipeline.report.runs.command import command_to_repeat, typed_command
from alignkd.pipeline.report.runs.run import Run
from alignkd.pipeline.report.words import short
from alignkd.pipeline.runtime.printable import json_text
from alignkd.pipeline.runtime.redact import REMOVED

_NOT_SET = "not set"
_LONGEST = 2000


def flat(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Settings by name; those inside of others have both names, with a dot between them."""
    found = dict[str, Any]()
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{before}{name}.")
        else:
            found[f"{before}{name}"] = value
    return found


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Settings and versions that are not the same in all runs, with the value of each run; where it writes to is left out."""
    each = [flat({**run.settings, "versions": run.versions}) for run in runs]
    names = dict.fromkeys(name for settings in each for name in settings)
    found = {name: [settings.get(name, _NOT_SET) for settings in each] for name in names if name != "out"}
    return {name: values for name, values in found.items() if any(value != values[0] for value in values[1:])}


def settings_section(runs: Sequence[Run]) -> tuple[Html, dict[str, Any]]:
    """What differs first, then everything."""
    parts = list[Text]()
    different = differing(runs) if len(runs) > 1 else {}
    if len(runs) > 1:
        heads = ["setting", *(run.name for run in runs)]
        rows = [[name, *map(_words, values)] for name, values in different.items()]
        parts.append(table(heads, rows) if rows else small("All settings are the same, but for the folder of the run."))
    for run in runs:
        parts.append(_of_run(run, named=len(runs) > 1))
    return section("Settings that differ, and all settings" if len(runs) > 1 else "Settings", *parts), different


def _of_run(run: Run, *, named: bool) -> Html:
    before = f"{run.name}: " if named else ""
    command, typed = command_to_repeat(run), typed_command(run)
    everything = flat(run.settings) | flat(run.versions, "versions.")
    remarks = ["Every setting that is not the default is in it; it writes to a folder beside the run's."]
    if REMOVED in command:
        remarks.append(f"Credentials were replaced by {REMOVED}: put them back.")
    if run.settings.get("plugins"):
        remarks.append("Plugins are compared by their content: run.json has the SHA-256 of each.")
    parts: list[Text] = [heading(joined([before, "the command that repeats the run"]), 3), preformatted(command)]
    parts.append(small(" ".join(remarks)))
    if typed is not None:
        parts.append(details(f"{before}as it was typed", preformatted(typed)))
    rows = [[name, _words(value)] for name, value in everything.items()]
    parts.append(details(f"{before}all {len(rows)} settings and versions", table(["setting", "value"], rows)))
    return joined(parts)


def _words(value: object) -> str:
    if value is None:
        return _NOT_SET
    if isinstance(value, bool):
        return "yes" if value else "no"
    return short(value if isinstance(value, str) else json_text(value), _LONGEST)
