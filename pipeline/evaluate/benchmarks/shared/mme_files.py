"""MME's folders: a picture and the two questions about it, side by side or in folders of their own."""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from alignkd.errors import DataError
from alignkd.pipeline.evaluate.benchmarks.contract import About
from alignkd.pipeline.evaluate.benchmarks.files import read_text, require_files

RELEASE = "MME_Benchmark_release_version"
PERCEPTION = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork"),
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
ENDING = "Please answer yes or no."
"""Of the official questions; some have two spaces before it."""

_PICTURES = (".jpg", ".png", ".jpeg")
_LARGEST_TEXT = 2**20


@dataclass(frozen=True)
class Asked:
    """A question as its file has it, and its label, ``Yes`` or ``No``."""

    text: str
    label: str

    @property
    def plain(self) -> str:
        """The question without its ending."""
        return without_ending(self.text)


@dataclass(frozen=True)
class Picture:
    """A picture of a category, below the release folder, and what is asked about it. The file may be missing."""

    category: str
    stem: str
    reference: str
    asked: tuple[Asked, Asked]


def without_ending(question: str) -> str:
    """A question without "Please answer yes or no." and the spaces around."""
    return question.replace(ENDING, "").strip()


def stem_of(reference: str) -> str:
    """What a picture and its file of questions are both called."""
    return PurePosixPath(reference).stem


def read_pictures(folder: Path, about: About) -> list[Picture]:
    """All pictures, by category in the official order and by name.

    Raises:
        DataError: categories are missing, or a file does not hold two questions, each with a tab and Yes or No.
    """
    categories = [*PERCEPTION, *COGNITION]
    (release,) = require_files(folder, about, [RELEASE])
    require_files(folder, about, [f"{RELEASE}/{category}" for category in categories])
    return [picture for category in categories for picture in _category(release / category, category)]


def _category(folder: Path, category: str) -> list[Picture]:
    apart = "images" if (folder / "images").is_dir() else ""
    texts = folder / "questions_answers_YN" if apart else folder
    files: dict[str, str] = {}
    for name in reversed(_names(folder / apart)):
        if name.lower().endswith(_PICTURES):
            files[stem_of(name)] = name
    stems = [name[: -len(".txt")] for name in _names(texts) if name.endswith(".txt")]
    if not stems:
        raise DataError(f"{texts} holds no questions ({category} of MME): download the official files again")
    # The picture of a file of questions may be missing: it is called as most of the others are.
    usual = Counter(Path(name).suffix for name in sorted(files.values())).most_common(1)
    suffix = usual[0][0] if usual else ".jpg"
    return [
        Picture(category, stem, f"{category}/{apart}{'/' * bool(apart)}{files.get(stem, stem + suffix)}", _asked(texts, stem))
        for stem in stems
    ]


def _names(folder: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: {getattr(error, 'strerror', None) or error}; download the official files again") from error


def _asked(folder: Path, stem: str) -> tuple[Asked, Asked]:
    path = folder / f"{stem}.txt"
    lines = [line.strip() for line in read_text(path, _LARGEST_TEXT).split("\n") if line.strip()]
    asked = []
    for number, line in enumerate(lines, start=1):
        question, *labels = line.split("\t")
        if len(labels) != 1 or labels[0].strip().lower() not in ("yes", "no"):
            raise DataError(f"{path}, question {number}: found {line!r:.120}, expected a question, a tab, and Yes or No")
        asked.append(Asked(question, labels[0].strip()))
    if len(asked) != 2 or asked[0].plain == asked[1].plain:
        raise DataError(
            f"{path}: {len(asked)} lines about one picture, expected two different questions: half a pair has no score;"
            " download it again"
        )
    return asked[0], asked[1]
