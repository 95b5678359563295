"""What is done already: one file, replaced whole after each step."""

import json
from pathlib import Path
from typing import Any

from alignkd.errors import CheckpointError, ConfigError
from alignkd.pipeline.runtime.files import replace_text
from alignkd.plain_files import read_plain

NAME = "rounds.json"
_LARGEST = 64 * 2**20


class State:
    """The steps of a folder that are done, and the settings that they were done with."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings, self.done = folder / NAME, settings, list[str]()

    def begin(self, *, resume: bool) -> None:
        """Take up what is in the folder.

        Raises:
            ConfigError: it holds rounds and ``resume`` was not given, or rounds of other settings.
            CheckpointError: its record cannot be read.
        """
        if not self.path.exists():
            self._write()
            return
        if not resume:
            raise ConfigError(f"--out {self.path.parent} already holds rounds: continue them with --resume, or choose another")
        try:
            found = json.loads(read_plain(self.path, _LARGEST))
            before, done = dict(found["settings"]), [str(name) for name in found["done"]]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{self.path} is damaged: restore it from a copy, or remove {self.path.parent} and begin again"
            ) from error
        now = json.loads(json.dumps(self.settings))
        if differing := sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key)):
            shown = "; ".join(f"{key}: {before.get(key)!r:.80} before, {now.get(key)!r:.80} here" for key in differing)
            raise ConfigError(f"--out {self.path.parent} has rounds of other settings: {shown}. Choose another --out")
        self.done = done

    def mark(self, name: str) -> None:
        """A step is done."""
        self.done.append(name)
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self.path, json.dumps({"settings": self.settings, "done": self.done}, indent=2) + "\n")
