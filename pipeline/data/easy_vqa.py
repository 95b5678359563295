"""easy-VQA (PyPI ``easy-vqa``, MIT) as LLaVA-format files, and how far its questions can be answered without the image.

5,000 images of 64 x 64 pixels, one coloured shape each; 38,575 training and 9,673 test questions; 13 answers.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alignkd.errors import ConfigError, DataError, wrap_errors

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")


@dataclass(frozen=True)
class Question:
    """A question of easy-VQA; ``image`` is its path below the package's data folder."""

    id: str
    image: str
    text: str
    answer: str


@dataclass(frozen=True)
class EasyVqa:
    """Both official splits, and the folder of the images."""

    root: Path
    train: list[Question]
    test: list[Question]


def load_easy_vqa() -> EasyVqa:
    """Read the installed package.

    Raises:
        ConfigError: it is not installed.
        DataError: its files are not those of easy-VQA 1.0.
    """
    try:
        import easy_vqa
    except ImportError as error:
        raise ConfigError("the demo needs the package easy-vqa; install it with: pip install 'alignkd[demo]'") from error
    root = Path(easy_vqa.__file__).parent / "data"
    splits = {}
    for name in ("train", "test"):
        path = root / name / "questions.json"
        damaged = f"{path} is damaged; install the package again: pip install --force-reinstall 'alignkd[demo]'"
        with wrap_errors(DataError, damaged, OSError, ValueError, TypeError):
            triples = json.loads(path.read_text())
            splits[name] = [
                Question(f"{name}-{i}", f"{name}/images/{image}.png", text, answer)
                for i, (text, answer, image) in enumerate(triples)
            ]
    return EasyVqa(root, splits["train"], splits["test"])


def few_labelled(questions: list[Question], share: float, seed: int) -> list[Question]:
    """The questions about a random share of the images."""
    images = sorted({question.image for question in questions})
    generator = np.random.default_rng(seed)
    chosen = set(generator.choice(images, size=round(share * len(images)), replace=False).tolist())
    return [question for question in questions if question.image in chosen]


def write_llava(questions: Iterable[Question], path: Path) -> Path:
    """Write questions in LLaVA's format."""
    records = [
        {
            "id": q.id,
            "image": q.image,
            "conversations": [{"from": "human", "value": f"<image>\n{q.text}"}, {"from": "gpt", "value": q.answer}],
        }
        for q in questions
    ]
    path.write_text(json.dumps(records))
    return path


def question_only_floor(train: list[Question], test: list[Question]) -> float:
    """Accuracy of answering each question with the most common training answer to its text, without the image."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for question in train:
        answers[question.text][question.answer] += 1
    overall = Counter(question.answer for question in train).most_common(1)[0][0]
    guesses = {text: counter.most_common(1)[0][0] for text, counter in answers.items()}
    return sum(guesses.get(q.text, overall) == q.answer for q in test) / len(test)


def concept_labels(questions: list[Question]) -> dict[str, tuple[int, int]]:
    """Colour and shape of each image from its "what ..." questions, -1 where no question names it: like a caption."""
    labels: dict[str, list[int]] = defaultdict(lambda: [-1, -1])
    for question in questions:
        if not question.text.lower().startswith(("what", "which")):
            continue
        if question.answer in COLOURS:
            labels[question.image][0] = COLOURS.index(question.answer)
        elif question.answer in SHAPES:
            labels[question.image][1] = SHAPES.index(question.answer)
    return {image: (colour, shape) for image, (colour, shape) in labels.items()}


def statistics(data: EasyVqa) -> dict[str, Any]:
    """Counts of the data, for the report."""
    return {
        "train_questions": len(data.train),
        "test_questions": len(data.test),
        "train_images": len({q.image for q in data.train}),
        "test_images": len({q.image for q in data.test}),
        "answers": len({q.answer for q in data.train}),
    }
