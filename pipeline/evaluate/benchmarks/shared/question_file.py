"""LLaVA's question files: what is asked, in which words and order. They hold no answers."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from alignkd.errors import DataError
from alignkd.pipeline.evaluate.benchmarks.files import read_json_lines
from alignkd.pipeline.evaluate.benchmarks.shared.fields import Entry

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
"""What LLaVA and lmms-eval end short questions with."""
LETTER_ANSWER = "\nAnswer with the option's letter from the given choices directly."
"""What they end multiple-choice questions with."""


@dataclass(frozen=True)
class Asked:
    """One line of a question file; ``where`` says which, in words."""

    question_id: str
    image: str
    text: str
    where: str


def read_questions(path: Path) -> list[Asked]:
    """The lines of a question file whose ids are texts.

    Raises:
        DataError: it cannot be read, holds no line, or a line lacks a field.
    """
    lines = [Entry(line, f"{path}, line {number}") for number, line in read_json_lines(path)]
    if not lines:
        raise DataError(f"{path} holds no questions; download it again, or remove it: questions are built without it")
    return [Asked(line.text("question_id"), line.text("image"), line.text("text"), line.where) for line in lines]


def same_ids(path: Path, asked: Iterable[str], official: Iterable[str]) -> None:
    """Refuse a question file that does not ask just what the official file holds.

    Raises:
        DataError: ids are in one of them alone, or in the question file twice.
    """
    given, known = list(asked), set(official)
    seen = set(given)
    if unknown := [one for one in given if one not in known]:
        raise DataError(_mismatch(path, f"{len(unknown):,} of its questions are not in the official file", unknown[0]))
    if missing := sorted(known - seen):
        raise DataError(_mismatch(path, f"it lacks {len(missing):,} of the {len(known):,} official questions", missing[0]))
    if len(seen) < len(given):
        ((twice, count),) = Counter(given).most_common(1)
        raise DataError(_mismatch(path, f"a question stands in it {count:,} times", twice))


def _mismatch(path: Path, found: str, first: str) -> str:
    return (
        f"{path} is not the question file of these official files: {found} (the first: {first!r:.80}); get both from their"
        " sources, or remove it: questions are built without it"
    )


def differs(line: Asked, name: str, found: str, expected: str) -> DataError:
    """The error for a line that is not about what the official file says."""
    return DataError(
        f"{line.where} (question {line.question_id!r:.80}): {name} is {found!r:.120}, the official file says {expected!r:.120};"
        " the files are of different versions: get both from their sources, or remove the question file"
    )
