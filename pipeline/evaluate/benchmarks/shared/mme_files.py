"""MME's folders: a picture and the two questions about it, side by side or in folders of their own."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from alignkd.errors import DataError
from alignkd.pipeline.evaluate.benchmarks.contract import About
from alignkd.pipeline.evaluate.benchmarks.files import read_json_lines, read_text, require_files
from alignkd.pipeline.evaluate.benchmarks.shared.fields import Entry
from alignkd.pipeline.evaluate.benchmarks.shared.question_file import SHORT_ANSWER

RELEASE = "MME_Benchmark_release_version"
PERCEPTION = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork"),
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
ENDING = "Please answer yes or no."
"""Of the official questions; some have two spaces before it."""

_ENDINGS = (SHORT_ANSWER.strip(), "Answer the question directly with a short sentence or phrase.")
"""Of prompts, in place of the official one."""
Key = tuple[str, str, str]
"""Category, name of the picture without suffix, and the question without its ending."""
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


@dataclass(frozen=True)
class Line:
    """What is asked, as LLaVA's question file has it or would: id, picture, text; and what the official files hold of it."""

    question_id: str
    image: str
    text: str
    picture: Picture
    asked: Asked


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


def key_of(question_id: str | int, prompt: str) -> Key:
    """What says which question a line of a question or answer file is about."""
    name = str(question_id)
    for ending in _ENDINGS:
        prompt = prompt.replace(ending, "")
    return name.split("/", 1)[0], stem_of(name), without_ending(prompt)


def read_question_file(path: Path, official: Mapping[Key, tuple[Picture, Asked]]) -> list[Line]:
    """The lines of LLaVA's question file.

    Raises:
        DataError: it does not ask just what the official files hold, or the two questions about a picture are apart.
    """
    asked: dict[Key, Line] = {}
    for number, value in read_json_lines(path):
        line = Entry(value, f"{path}, line {number}")
        name, image, text, category = (line.text(field) for field in ("question_id", "image", "text", "category"))
        key = key_of(name, text)
        wrong = (category, stem_of(image)) != key[:2] or key in asked or not text.endswith(SHORT_ANSWER)
        if key not in official or wrong:
            reason = "twice" if key in asked else "which the official files do not, in these words and of this picture"
            raise DataError(
                f"{line.where} asks {text!r:.120} about {name!r:.80}, {reason}; get both from their sources, or remove the"
                " question file: questions are built without it"
            )
        asked[key] = Line(name, image, text, *official[key])
    if missing := [key for key in official if key not in asked]:
        raise DataError(
            f"{path} lacks {len(missing):,} of the {len(official):,} official questions (the first: {missing[0][2]!r:.80}"
            f" about {missing[0][0]}/{missing[0][1]}); get both from their sources, or remove it"
        )
    _require_neighbours(path, asked)
    return list(asked.values())


def _require_neighbours(path: Path, keys: Mapping[Key, Any]) -> None:
    for category in dict.fromkeys(key[0] for key in keys):
        stems = [key[1] for key in keys if key[0] == category]
        if apart := [first for first, second in zip(stems[::2], stems[1::2], strict=True) if first != second]:
            raise DataError(
                f"{path}: the two questions about {category}/{apart[0]} do not follow each other among those of {category};"
                " download it again, or remove it"
            )
