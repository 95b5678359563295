"""The command that repeats a run, from its resolved settings: complete, without a settings file or a recipe file."""

import dataclasses
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from alignkd.losses.recipes import RECIPES, Recipe
from alignkd.pipeline.config.distill import DistillConfig
from alignkd.pipeline.report.runs.run import Run
from alignkd.settings import flag_of, setting_of

_NOT_REPEATED = ("out", "resume")
_BASE = "sft"
"""The recipe that others are written as changes of, where their name is no known one; its numbers are a recipe's defaults."""


def command_to_repeat(run: Run) -> str:
    """The command line, as it can be pasted into a shell; it writes beside the run's own folder."""
    words = ["alignkd", "distill", *_recipe(run.recipe), *_options(run.settings)]
    words += ["--out", f"{run.setting('out') or run.folder}-again"]
    processes = (run.result or {}).get("processes")
    if isinstance(processes, int) and processes > 1:
        words = ["torchrun", "--nproc-per-node", str(processes), "--no-python", *words]
    return shlex.join(words)


def typed_command(run: Run) -> str | None:
    """What was typed, where a command line began the run."""
    typed = run.record.get("arguments")
    if not isinstance(typed, list) or "distill" not in typed:
        return None
    return shlex.join(["alignkd", *map(str, typed)])


def _recipe(recipe: Mapping[str, Any]) -> Iterator[str]:
    name = str(recipe.get("name"))
    base = name if name in RECIPES else _BASE
    known = RECIPES[base]
    yield from ("--recipe", base)
    for field in dataclasses.fields(Recipe):
        value = recipe.get(field.name, getattr(known, field.name))
        if field.name != "extra" and value != getattr(known, field.name):
            yield from ("--set", f"{field.name}={_yaml(value)}")
    extra = recipe.get("extra")
    for term, weight in (extra if isinstance(extra, Mapping) else {}).items():
        yield from ("--set", f"{term}={_yaml(weight)}")


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _options(settings: Mapping[str, Any]) -> Iterator[str]:
    """Every option whose value is not the default, as it is typed."""
    for field in dataclasses.fields(DistillConfig):
        declared = setting_of(field)
        if declared is None or field.name in _NOT_REPEATED or field.name not in settings:
            continue
        value, flag = settings[field.name], flag_of(field)
        if value is None or (isinstance(value, list) and tuple(value) == field.default) or value == field.default:
            continue
        if isinstance(value, bool):
            yield flag if value else f"--no-{flag.lstrip('-')}"
        elif isinstance(value, list) and declared.comma_separated:
            yield from (flag, ",".join(map(str, value)))
        elif isinstance(value, list):
            for one in value:
                yield from (flag, str(one))
        else:
            yield from (flag, str(value))
