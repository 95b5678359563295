"""What was found of a number of samples, in counts that add up: parts are looked at by several processes."""

import re
from array import array
from collections import Counter
from dataclasses import dataclass, field

from alignkd.cache_store.rows.reasons import reason_class

_MOST_KINDS = 500
"""Different reasons that are kept apart; others are counted by their class."""
_DETAILS = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\d[\d,]*")
_LONGEST_KIND = 160
_MOST_READ = 2000
"""Characters of a reason that its kind depends on: a reason may quote what others wrote, of any length."""


@dataclass(frozen=True)
class Named:
    """A sample by its id (its key, where it has none), with what was found of it."""

    id: str
    what: str
    source: str = ""


def kind_of(reason: str, place: str = "") -> str:
    """A reason without the names and numbers of one sample, so that equal faults of many samples are counted together."""
    text = (reason.replace(place, "...") if place else reason)[:_MOST_READ]
    return _DETAILS.sub(lambda found: "N" if found[0][0].isdigit() else "'...'", text)[:_LONGEST_KIND]


@dataclass
class Found:
    """How many samples have something, by its kind, and the ``first`` few of each."""

    first: int
    counts: Counter[str] = field(default_factory=Counter)
    named: dict[str, list[Named]] = field(default_factory=dict)

    def add(self, kind: str, named: Named) -> None:
        """Count a sample."""
        self.merge_kind(kind, 1, [named])

    def merge_kind(self, kind: str, count: int, named: list[Named]) -> None:
        """Count samples of one kind."""
        if kind not in self.counts and len(self.counts) >= _MOST_KINDS:
            kind = f"other reasons ({reason_class(named[0].what) if named else 'text'})"
        self.counts[kind] += count
        kept = self.named.setdefault(kind, [])
        kept += named[: self.first - len(kept)]

    def merge(self, other: "Found") -> None:
        """Add what was found of later samples."""
        for kind, count in other.counts.items():
            self.merge_kind(kind, count, other.named[kind])

    @property
    def total(self) -> int:
        """All that were counted."""
        return self.counts.total()


@dataclass
class Tally:
    """What was found of the samples of one source.

    ``lengths``: characters, or positions with a model, of each sample that can be used. ``read_otherwise``: what of a record is
    read otherwise than its author may have meant. ``cut``: samples whose text is cut at the maximum length.
    """

    first: int
    samples: int = 0
    system_turns: int = 0
    turns: Counter[int] = field(default_factory=Counter)
    images: Counter[int] = field(default_factory=Counter)
    lengths: "array[int]" = field(default_factory=lambda: array("q"))
    provenances: Counter[str] = field(default_factory=Counter)
    rejected: Found = field(init=False)
    read_otherwise: Found = field(init=False)
    cut: Found = field(init=False)

    def __post_init__(self) -> None:
        self.rejected, self.read_otherwise, self.cut = Found(self.first), Found(self.first), Found(self.first)

    def merge(self, other: "Tally") -> None:
        """Add what was found of later samples."""
        self.samples += other.samples
        self.system_turns += other.system_turns
        self.turns += other.turns
        self.images += other.images
        self.lengths += other.lengths
        self.provenances += other.provenances
        self.rejected.merge(other.rejected)
        self.read_otherwise.merge(other.read_otherwise)
        self.cut.merge(other.cut)
