"""One training run: what its folder says, whether it has ended or not."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from alignkd.losses.recipes import TERMS

Series = tuple[list[int], list[float]]
"""Steps and the values there; NaN where a value was not finite."""

EVAL = "eval/"
"""Names of figures on held-out samples begin so."""

_MOST = 1e30
"""Beyond this, a value is no more a figure that can be drawn than an infinity."""


@dataclass(frozen=True)
class Run:
    """A run of ``alignkd distill``. Record and result hold no credentials; any text may come from others.

    ``name``: its own among the runs shown together. ``record``: of ``run.json``. ``lines``: of ``metrics.jsonl``; ``torn``: its
    last line was cut short. ``result``: of ``result.json``, None for a run that has not ended. ``state``: in words.
    """

    folder: Path
    name: str
    record: dict[str, Any]
    lines: tuple[dict[str, Any], ...]
    torn: bool
    result: dict[str, Any] | None
    state: str

    @property
    def settings(self) -> dict[str, Any]:
        """The resolved configuration."""
        found: dict[str, Any] = self.record["configuration"]
        return found

    @property
    def versions(self) -> dict[str, Any]:
        """Versions, platform and device that the run recorded."""
        found = self.record.get("versions")
        return found if isinstance(found, dict) else {}

    @property
    def recipe(self) -> dict[str, Any]:
        """The fields of the recipe."""
        found: dict[str, Any] = self.settings["recipe"]
        return found

    @property
    def recipe_name(self) -> str:
        """The recipe's name, as the run recorded it."""
        return str(self.recipe.get("name", "unnamed"))

    @property
    def last_step(self) -> int:
        """The step of the last line; 0 before there is one."""
        return int(self.lines[-1]["step"]) if self.lines else 0

    @property
    def student(self) -> Path:
        """Where the trained student lies, or will."""
        return self.folder / "student"

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of all figures that are numbers somewhere, in the order in which they first come."""
        return tuple(dict.fromkeys(name for line in self.lines for name, value in line.items() if number(value) is not None))

    @cached_property
    def terms(self) -> tuple[str, ...]:
        """The terms of the loss that the lines log with a weight, in the order of the method; others after them."""
        logged = [name.removeprefix("weighted/") for name in self.names if name.startswith("weighted/")]
        used = {name for name in logged if any(value != 0 for value in self.series(f"weighted/{name}")[1])}
        return tuple(name for name in (*TERMS, *sorted(used - set(TERMS))) if name in used)

    @cached_property
    def held_out(self) -> tuple[str, ...]:
        """The names of all figures on held-out samples."""
        return tuple(name for name in self.names if name.startswith(EVAL))

    def series(self, name: str) -> Series:
        """The values of one figure over the steps; those that JSON could not hold are NaN."""
        found = [(int(line["step"]), line[name]) for line in self.lines if name in line]
        kept = [(step, math.nan if value is None else number(value)) for step, value in found]
        shown = [(step, value) for step, value in kept if value is not None]
        return [step for step, _ in shown], [value for _, value in shown]

    def last(self, name: str) -> float | None:
        """The last finite value of a figure."""
        return next((value for value in reversed(self.series(name)[1]) if math.isfinite(value)), None)

    def setting(self, name: str) -> str | None:
        """A setting that is a text, such as a path; None where it is not set."""
        value = self.settings.get(name)
        return value if isinstance(value, str) and value else None

    def texts(self, name: str) -> tuple[str, ...]:
        """A setting of one text or several."""
        value = self.settings.get(name)
        return tuple(one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str) and one)

    def local_paths(self, name: str) -> tuple[str, ...]:
        """A setting of one path or several; none where it names something on a network, as the record may come from others."""
        value = self.settings.get(name)
        found = tuple(value) if isinstance(value, list) else (value,)
        local = all(isinstance(path, str) and path and "://" not in path and "::" not in path for path in found)
        return found if local else ()


def number(value: object) -> float | None:
    """A value as a number; None where it is none, NaN where it is too large to draw."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < _MOST else math.nan


def unique_names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the folders' paths that tell them apart; the same folder twice gets its place in the list."""
    parts = [folder.absolute().parts for folder in folders]
    names = [str(Path(*path[-1:])) for path in parts]
    for length in range(2, max(map(len, parts), default=0) + 1):
        names = [str(Path(*path[-length:])) if names.count(name) > 1 else name for name, path in zip(names, parts, strict=True)]
    return [f"{name} ({place})" if names.count(name) > 1 else name for place, name in enumerate(names, start=1)]
