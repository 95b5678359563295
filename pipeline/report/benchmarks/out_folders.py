"""What ``alignkd benchmark run`` left in its output folders, read without trust: plain files, of known fields and types."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkd.errors import ConfigError, DataError
from alignkd.pipeline.evaluate.benchmarks.contract import PROTOCOLS
from alignkd.pipeline.evaluate.benchmarks.files import read_json, read_json_lines
from alignkd.pipeline.evaluate.benchmarks.registry import BENCHMARKS

_LONGEST_NAME = 4096
_AGAIN = "run the same alignkd benchmark run again: it continues"


@dataclass(frozen=True)
class Line:
    """One question with what was made of its answer: a line of ``predictions.jsonl``."""

    id: str | int
    question: str
    images: tuple[str, ...]
    prediction: str | None
    parsed: str
    answers: tuple[str, ...]
    score: float
    category: str
    counted: bool


@dataclass(frozen=True)
class Result:
    """One benchmark of one model: ``result.json``, and the lines of ``predictions.jsonl``."""

    benchmark: str
    title: str
    protocol: str
    score: float
    unit: str
    model: str
    folder: str
    notes: tuple[str, ...]
    settings: Mapping[str, Any]
    lines: tuple[Line, ...]

    @property
    def limit(self) -> int | None:
        """How many questions were asked for, where it was not all of them."""
        return self.settings.get("limit")


@dataclass(frozen=True)
class Model:
    """One output folder. ``name``: of the model's folder, unlike any other model's."""

    name: str
    out: Path
    results: Mapping[str, Result]


def read_models(outs: Sequence[str]) -> list[Model]:
    """The models of several output folders, in this order.

    Raises:
        ConfigError: no folder is given, or one is given twice.
        DataError: one is no output folder, is not finished, or its files are damaged.
    """
    if not outs:
        raise ConfigError("no folder is given; name one or more --out folders of alignkd benchmark run")
    if twice := [out for out, count in Counter(str(Path(out).resolve()) for out in outs).items() if count > 1]:
        raise ConfigError(f"{twice[0]} is given twice; name each --out folder once")
    found = [(Path(out), _read_results(Path(out))) for out in outs]
    folders = [next(iter(results.values())).model for _, results in found]
    names = _unique_names(folders, [out for out, _ in found])
    return [Model(name, out, results) for name, (out, results) in zip(names, found, strict=True)]


def _read_results(out: Path) -> dict[str, Result]:
    if not out.is_dir():
        raise DataError(f"{out} is not a folder; expected an --out folder of alignkd benchmark run")
    begun = [name for name in BENCHMARKS if (out / name).is_dir()]
    if not begun:
        raise DataError(f"{out} holds no benchmark; expected an --out folder of alignkd benchmark run, with a folder for each")
    results = {name: _read_result(out / name, name) for name in begun}
    if len(models := {result.model for result in results.values()}) > 1:
        raise DataError(f"{out} holds results of several models ({', '.join(sorted(models))}); use one --out folder for each")
    return results


def _read_result(folder: Path, name: str) -> Result:
    if absent := [file for file in ("result.json", "predictions.jsonl") if not (folder / file).exists()]:
        raise DataError(f"{folder} lacks {', '.join(absent)}: this benchmark is not finished; {_AGAIN}")
    path = folder / "result.json"
    found = read_json(path)
    if not isinstance(found, dict):
        raise DataError(f"{path} is not an object; {_AGAIN}")
    lines = tuple(_line(value, f"{folder / 'predictions.jsonl'}, line {number}") for number, value in _lines(folder))
    if field(found, "benchmark", str, path) != name:
        raise DataError(f"{path} is a result of {found['benchmark']!r:.40}, expected {name}")
    if field(found, "protocol", str, path) not in PROTOCOLS:
        raise DataError(f"{path}: protocol {found['protocol']!r:.40}; known are {', '.join(PROTOCOLS)}")
    if field(found, "questions", int, path) != len(lines) or not lines:
        raise DataError(f"{path} tells of {found['questions']:,} questions, predictions.jsonl of {len(lines):,}; {_AGAIN}")
    score, limit = field(found, "score", float, path), field(found, "settings", dict, path).get("limit")
    if not math.isfinite(score) or not isinstance(limit, int | None):
        raise DataError(f"{path}: score {score!r}, limit {limit!r:.40}: expected numbers; {_AGAIN}")
    return Result(
        name,
        **{key: _name(found, key, path) for key in ("title", "protocol", "unit", "model", "folder")},
        score=float(score),
        notes=tuple(str(note) for note in field(found, "notes", list, path)),
        settings=found["settings"],
        lines=lines,
    )


def _lines(folder: Path) -> Sequence[tuple[int, dict[str, Any]]]:
    return list(read_json_lines(folder / "predictions.jsonl"))


def _line(value: dict[str, Any], where: str) -> Line:
    image, prediction, score = value.get("image"), value.get("prediction"), field(value, "score", float, where)
    images = () if image is None else tuple(image) if isinstance(image, list) else (image,)
    answers = tuple(field(value, "answers", list, where))
    if not all(isinstance(text, str) for text in (*images, *answers)) or not isinstance(prediction, str | None):
        raise DataError(f"{where}: 'image', 'answers' and 'prediction' are to be texts; {_AGAIN}")
    if not 0 <= score <= 1:
        raise DataError(f"{where}: score {score!r}, expected 0 to 1; {_AGAIN}")
    if not isinstance(given := value.get("id"), str | int):
        raise DataError(f"{where}: 'id' is {given!r:.80}, expected a text or a whole number; {_AGAIN}")
    texts = {key: field(value, key, str, where) for key in ("question", "parsed")} | {
        "category": _name(value, "category", where)
    }
    counted = field(value, "counted", bool, where)
    return Line(given, images=images, prediction=prediction, answers=answers, score=float(score), counted=counted, **texts)


def _name(value: Mapping[str, Any], key: str, where: object) -> str:
    """A text that is shown whole."""
    found: str = field(value, key, str, where)
    if len(found) > _LONGEST_NAME:
        raise DataError(f"{where}: {key!r} has {len(found):,} characters, more than the {_LONGEST_NAME:,} allowed; {_AGAIN}")
    return found


def field(value: Mapping[str, Any], name: str, kind: type, where: object) -> Any:
    """A field of an object, of the type that it must have.

    Raises:
        DataError: it is missing, or of another type.
    """
    found = value.get(name)
    accepted = (int, float) if kind is float else (kind,)
    right = isinstance(found, accepted) and (kind is bool or not isinstance(found, bool))
    too_large = kind is float and isinstance(found, int | float) and abs(found) > 1e12
    if not right or too_large:
        raise DataError(f"{where}: {name!r} is {found!r:.80}, expected a value of type {kind.__name__}; {_AGAIN}")
    return found


_GENERAL = ("student", "student-official", "model", "checkpoint", "best", "final")
"""Names of folders that say nothing of the model in them."""


def _unique_names(folders: Sequence[str], outs: Sequence[Path]) -> list[str]:
    """The last parts of each model's folder, as many as tell it from others; where that is none, the output folder too."""
    paths = [Path(folder).parts for folder in folders]
    names = []
    for path in paths:
        others = [other for other in paths if other != path]
        enough = next((n for n in range(1, len(path)) if all(other[-n:] != path[-n:] for other in others)), len(path))
        if path and path[-1].startswith(_GENERAL):
            enough = max(enough, 2)
        names.append("/".join(path[-enough:]) or ".")
    full = [f"{name} ({out})" if names.count(name) > 1 else name for name, out in zip(names, outs, strict=True)]
    assert len(set(full)) == len(full)
    return full
