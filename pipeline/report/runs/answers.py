"""Answers that ``alignkd evaluate`` or ``alignkd benchmark run`` wrote: what was asked, said and expected, and the pictures."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from alignkd.errors import AlignkdError, DataError, wrap_errors
from alignkd.models.encoders.image_files import decode_image, read_image_bytes
from alignkd.pipeline.data.image_paths import image_path
from alignkd.pipeline.evaluate.benchmarks.registry import BENCHMARKS, benchmark_class
from alignkd.pipeline.report.runs.run import number
from alignkd.pipeline.report.words import percent
from alignkd.plain_files import read_plain

FILE = "predictions.jsonl"
_MOST_BYTES = 2**30

ReadPicture = Callable[[str], Image.Image]
"""The picture of a reference; an :class:`AlignkdError` or OSError where it cannot be read."""


@dataclass(frozen=True)
class Answer:
    """One answer. ``score``: from 0 to 1; None where it does not count. ``key``: equal for the same question in two files."""

    id: str
    question: str
    images: tuple[str, ...]
    prediction: str
    expected: str
    score: float | None
    key: tuple[str, ...]


@dataclass(frozen=True)
class AnswerFile:
    """The answers of one benchmark, or of ``evaluate``. ``summary``: the score in words, empty before there is one."""

    name: str
    answers: tuple[Answer, ...]
    summary: str
    read_picture: ReadPicture = field(repr=False)


def find_answers(folder: Path, images: str | None = None, run_images: str | None = None) -> list[AnswerFile]:
    """What lies in a folder that ``evaluate`` or ``benchmark run`` wrote to.

    ``images``: where the pictures are instead. ``run_images``: where those of the run are, which may be the same.

    Raises:
        DataError: nothing of that kind lies there, or it is damaged.
    """
    below = sorted(path.parent for path in folder.glob(f"*/{FILE}") if path.parent.name in BENCHMARKS)
    here = [folder] if (folder / FILE).is_file() else []
    if not here and not below:
        raise DataError(
            f"{folder} holds no predictions.jsonl; give the --out folder of an alignkd evaluate or alignkd benchmark run"
        )
    return [_read(place, images, run_images) for place in (*here, *below)]


def _read(folder: Path, images: str | None, run_images: str | None) -> AnswerFile:
    result, record = _object(folder / "result.json"), _object(folder / "run.json")
    benchmark = result.get("benchmark")
    name = str(benchmark) if benchmark else folder.name if folder.name in BENCHMARKS else "evaluate"
    settings = record.get("configuration")
    settings = settings if isinstance(settings, dict) else {}
    answers = tuple(_answers(folder / FILE))
    pictures = _of_benchmark(result) if name in BENCHMARKS else _below(images, settings.get("images"), run_images)
    return AnswerFile(name, answers, _summary(result), pictures)


def _summary(result: Mapping[str, Any]) -> str:
    score, accuracy = number(result.get("score")), number(result.get("accuracy"))
    if score is not None:
        return f"{score:,.2f}{' %' if result.get('unit') == 'percent' else ' points'} ({result.get('protocol', 'no protocol')})"
    if accuracy is None:
        return ""
    interval = result.get("interval_95")
    ends = [number(end) for end in interval] if isinstance(interval, list) and len(interval) == 2 else []
    known = [end for end in ends if end is not None]
    return percent(accuracy) + (f", 95 % interval {percent(known[0])} to {percent(known[1])}" if len(known) == 2 else "")


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is not there."""
    if not path.exists():
        return {}
    damaged = f"{path} is damaged, expected one JSON object: restore it, or leave these predictions out"
    with wrap_errors(DataError, damaged, ValueError, RecursionError, OSError):
        found = json.loads(read_plain(path, _MOST_BYTES))
    if not isinstance(found, dict):
        raise DataError(damaged)
    return found


def _answers(path: Path) -> list[Answer]:
    with wrap_errors(DataError, f"{path} cannot be read", OSError):
        lines = read_plain(path, _MOST_BYTES).split(b"\n")
    found = []
    for place, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            found.append(_answer(json.loads(text)))
        except (ValueError, RecursionError) as error:
            if place == len(lines):  # being written
                break
            raise DataError(f"{path}, line {place}, is damaged ({error}): restore the file, or remove the line") from error
    return found


def _answer(line: Any) -> Answer:
    if not isinstance(line, dict):
        raise ValueError("found no object")
    image = line.get("image")
    images = tuple(str(one) for one in image) if isinstance(image, list) else (str(image),) if image else ()
    expected = line.get("reference", line.get("answers", ""))
    expected = ", ".join(map(str, expected)) if isinstance(expected, list) else expected
    correct, score = line.get("correct"), number(line.get("score"))
    worth = score if score is not None else float(correct) if isinstance(correct, bool) else None
    counted = line.get("counted", True) is not False
    name, question = str(line.get("id")), str(line.get("question", ""))
    prediction = line.get("prediction")
    words = "(no answer)" if prediction is None else str(prediction) if str(prediction).strip() else "(empty)"
    return Answer(name, question, images, words, str(expected), worth if counted else None, (name, question, *images))


def _below(given: str | None, *known: object) -> ReadPicture:
    """Pictures below the folder that is given; without one, below the first of those known that is there."""
    there = [one for one in known if isinstance(one, str) and Path(one).is_dir()]

    def read(reference: str) -> Image.Image:
        if given is None and not there:
            raise DataError("its folder is not known or not there; give --images")
        return decode_image(read_image_bytes(image_path(Path(given or there[0]), reference)), reference)

    return read


def _of_benchmark(result: Mapping[str, Any]) -> ReadPicture:
    """Pictures of a benchmark, which is opened when the first is asked for."""
    opened: list[Any] = []

    def read(reference: str) -> Image.Image:
        if not opened:
            folder = Path(str(result.get("folder", "")))
            if not result.get("folder") or not folder.is_dir():
                raise DataError(f"the benchmark's folder {folder} is not there")
            opened.append(benchmark_class(str(result["benchmark"])).open(folder, str(result.get("protocol", "mobilevlm"))))
        return decode_image(opened[0].read_image(reference), reference)

    return read


def picture_or_reason(read: ReadPicture, reference: str) -> Image.Image | str:
    """A picture; why it cannot be shown, where it cannot."""
    try:
        return read(reference)
    except (AlignkdError, OSError, ValueError) as error:
        return str(error)
