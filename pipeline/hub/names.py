"""``ORG/NAME[@REVISION]``: how a model of the Hub is named where a folder is expected."""

import re
from dataclasses import dataclass
from pathlib import Path

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_NAME = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[A-Za-z0-9_][A-Za-z0-9._/-]{{0,199}}))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")

DEFAULT_REVISION = "main"


@dataclass(frozen=True)
class ModelName:
    """A repository of models. ``revision``: a branch, a tag or a commit; None where none was given."""

    repo: str
    revision: str | None = None

    @property
    def asked(self) -> str:
        """The revision, ``main`` where none was given."""
        return self.revision or DEFAULT_REVISION

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return is_commit(self.asked)

    @property
    def last(self) -> str:
        """The name without its organisation."""
        return self.repo.partition("/")[2]

    def at(self, commit: str) -> "ModelName":
        """The same repository at a commit."""
        return ModelName(self.repo, commit)

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def is_commit(text: str) -> bool:
    """Whether a text is the whole name of a commit."""
    return _COMMIT.fullmatch(text) is not None


def parse_name(text: str) -> ModelName | None:
    """The name in a text; None for anything else, such as a path. Whether a folder of that name exists is not looked at."""
    found = _NAME.fullmatch(text)
    if found is None or any(odd in text for odd in ("..", "--", "//")) or text.endswith(("/", ".")):
        return None
    return ModelName(found["repo"], found["revision"])


def name_of(text: str) -> ModelName | None:
    """As :func:`parse_name`, but None where a file or folder of that path exists: it wins over a name."""
    return None if Path(text).exists() else parse_name(text)
