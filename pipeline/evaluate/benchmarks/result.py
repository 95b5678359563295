"""A score as it is written and printed: one object for the benchmark, and one for each question."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from alignkd.errors import DataError
from alignkd.pipeline.evaluate.benchmarks.contract import Answer, Benchmark, Reading, Score
from alignkd.pipeline.evaluate.benchmarks.files import read_answers
from alignkd.pipeline.evaluate.benchmarks.registry import open_benchmark
from alignkd.pipeline.runtime.printable import json_text


def score_file(name: str, root: str, answers: str, protocol: str) -> tuple[dict[str, Any], tuple[Reading, ...]]:
    """The result of an answer file, and the reading of each question.

    Raises:
        AlignkdError: the benchmark is unknown, or files are missing, damaged, or do not belong together.
    """
    benchmark = open_benchmark(name, root, protocol)
    given = read_answers(Path(answers))
    matched = benchmark.match(given)
    score = benchmark.score(matched)
    return result_object(benchmark, score, unused_lines(given, matched)), score.readings


def result_object(benchmark: Benchmark, score: Score, notes: Iterable[str] = ()) -> dict[str, Any]:
    """What ``result.json`` holds of a score; ``notes`` follow those of the benchmark and of the score."""
    return {
        "benchmark": benchmark.about.name,
        "title": benchmark.about.title,
        "protocol": benchmark.protocol,
        "score": score.score,
        "unit": score.unit,
        "metrics": dict(score.metrics),
        "questions": len(benchmark.questions),
        "answered": sum(reading.prediction is not None for reading in score.readings),
        "notes": [*benchmark.notes, *score.notes, *notes],
        "settings": {**benchmark.settings, **score.settings},
    }


def prediction_line(reading: Reading) -> dict[str, Any]:
    """One line of ``predictions.jsonl``."""
    question = reading.question
    return {
        "id": question.question_id,
        "question": question.text,
        "image": None if not question.images else question.images[0] if len(question.images) == 1 else list(question.images),
        "prediction": reading.prediction,
        "parsed": reading.parsed,
        "answers": list(question.answers),
        "score": reading.score,
        "category": question.category,
        "counted": reading.counted,
    }


def unused_lines(answers: Sequence[Answer], matched: Sequence[Answer | None]) -> list[str]:
    """A note, if there are lines that answer no question, or are followed by another answer to the same."""
    used = {answer.line for answer in matched if answer is not None}
    unused = [answer for answer in answers if answer.line not in used]
    if not unused:
        return []
    first = ", ".join(str(answer.line) for answer in unused[:3])
    return [f"{len(unused):,} lines of the answer file are not used (the first: {first}): another question, or answered again"]


def write_result(path: str, result: dict[str, Any], readings: Iterable[Reading]) -> None:
    """Write a result, with a line on each question.

    Raises:
        DataError: the file cannot be written.
    """
    from alignkd.pipeline.runtime.files import replace_text  # numpy takes as long to import as everything else here

    try:
        lines = [prediction_line(reading) for reading in readings]
        replace_text(Path(path), json_text({**result, "predictions": lines}, indent=1) + "\n")
    except (OSError, ValueError) as error:
        raise DataError(f"--out {path} cannot be written: {getattr(error, 'strerror', None) or error}") from error
