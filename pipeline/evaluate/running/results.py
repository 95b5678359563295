"""Answers of all processes to the files of a result: answers, predictions, score."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignkd.pipeline.evaluate.benchmarks.contract import Benchmark, Question
from alignkd.pipeline.evaluate.benchmarks.result import prediction_line, result_object
from alignkd.pipeline.evaluate.running.answering import Answered, as_answers
from alignkd.pipeline.evaluate.running.parts import put_text
from alignkd.pipeline.runtime.printable import json_text

ANSWERS, PREDICTIONS, RESULT = "answers.jsonl", "predictions.jsonl", "result.json"


def write_results(
    folder: Path, benchmark: Benchmark, answers: Mapping[int, Answered], model: str, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the answer file, and the score and what was read of each answer; returns what ``result.json`` holds.

    Answers are written in any case, so that their scorer may refuse them and another tool read them.

    Raises:
        DataError: these answers have no score.
        TransientError, CheckpointError: they cannot be written.
    """
    name = Path(model).name or model
    asked = list(enumerate(benchmark.questions))
    put_text(folder / ANSWERS, _lines(answer_line(question, answers[index].text, name) for index, question in asked))
    (folder / RESULT).unlink(missing_ok=True)
    score = benchmark.score(as_answers(benchmark, {index: answer.text for index, answer in answers.items()}))
    put_text(folder / PREDICTIONS, _lines(map(prediction_line, score.readings)))
    seconds = sum(answers[index].seconds for index, _ in asked)
    result = result_object(benchmark, score)
    result |= {
        "settings": {**result["settings"], **settings},
        "model": model,
        "folder": str(benchmark.folder),
        "seconds": round(seconds, 3),
        "questions_per_second": round(len(asked) / seconds, 3) if seconds else None,
    }
    put_text(folder / RESULT, json.dumps(result, indent=2) + "\n")
    return result


def answer_line(question: Question, text: str, model: str) -> dict[str, Any]:
    """One line in LLaVA's answer format. Its ``answer_id`` is a digest, where LLaVA draws one at random."""
    content = json.dumps([question.question_id, question.prompt, text, model])
    return {
        "question_id": question.question_id,
        "prompt": question.prompt,
        "text": text,
        "answer_id": hashlib.sha256(content.encode()).hexdigest()[:22],
        "model_id": model,
        "metadata": {},
        **question.extra,
    }


def _lines(values: Any) -> str:
    return "".join(json_text(value) + "\n" for value in values)
