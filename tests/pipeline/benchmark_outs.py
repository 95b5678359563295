"""What the tests of benchmarks' report share: output folders as the runner writes them, with scores of the real scorers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from alignkd.pipeline.evaluate.benchmarks.files import read_answers
from alignkd.pipeline.evaluate.benchmarks.registry import open_benchmark
from alignkd.pipeline.evaluate.benchmarks.result import prediction_line, result_object

BENCHMARKS = Path(__file__).resolve().parents[1] / "data" / "benchmarks"
SIX = ("gqa", "sqa", "textvqa", "mme", "mmbench", "pope")


def write_out(out, model="models/one", names=SIX, protocol="mobilevlm", change=None, keep=None, **settings):
    """``change``: gives an answer's text from its place and text; ``keep``: indices of a benchmark's questions."""
    for name in names:
        benchmark = open_benchmark(name, BENCHMARKS, protocol)
        if keep is not None:
            benchmark = benchmark.only(keep(benchmark))
        answers = read_answers(BENCHMARKS / name / "predictions.jsonl")
        if keep is not None:
            ids = {str(question.question_id) for question in benchmark.questions}
            answers = [answer for answer in answers if str(answer.question_id) in ids]
        if change is not None:
            answers = [replace(answer, text=change(place, answer.text)) for place, answer in enumerate(answers)]
        score = benchmark.score(benchmark.match(answers))
        found = {**result_object(benchmark, score), "model": model, "folder": str(BENCHMARKS / name)}
        found["settings"] = {"dtype": "float32", "weights_sha256": model, **found["settings"], **settings}
        write_files(out / name, found, [prediction_line(reading) for reading in score.readings])
    return out


def write_files(folder, result, lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def edit_result(out, name, **fields):
    path = out / name / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_lines(out, name, edit):
    path = out / name / "predictions.jsonl"
    lines = [edit(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def opposite(text):
    """Another answer of the same kind."""
    if text.lower().startswith(("yes", "no")):
        return "No" if text.lower().startswith("yes") else "Yes"
    return "ABCD"[("ABCD".index(text) + 1) % 4] if text in ("A", "B", "C", "D") else "something else"
