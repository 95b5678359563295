"""GQA keeps the promises of a benchmark, and the official scorer's rules."""

from __future__ import annotations

import json
import random

import pytest
from benchmark_conformance import FIXTURES, BenchmarkConformance, lines_of, score_of, write_lines

from alignkd.errors import DataError

OFFICIAL = "testdev_balanced_questions.json"


def edit(folder, change):
    path = folder / OFFICIAL
    official = json.loads(path.read_text())
    path.write_text(json.dumps(change(official) or official))


class TestGqa(BenchmarkConformance):
    name = "gqa"
    official = (OFFICIAL,)
    question_files = ("llava_gqa_testdev_balanced.jsonl",)
    error_cases = {  # noqa: RUF012
        "no prediction for 20686617": lambda folder, lines: [line for line in lines if line["question_id"] != "20686617"],
        "half of the answers": lambda folder, lines: lines[::2],
        "ids written as integers": lambda folder, lines: [{**line, "question_id": int(line["question_id"])} for line in lines],
    }

    def readings(self, expected, protocol):
        for line in expected["per_question"]:
            fields = {"prediction": line["text"], "counted": line["balanced"]}
            if protocol == "mobilevlm":
                fields |= {"parsed": line["prediction"], "score": float(line["correct"])}
            else:
                fields |= {"score": line["lmms_eval"]}
            yield line["question_id"], fields

    def shuffle(self, folder):
        def change(official):
            return dict(random.Random(0).sample(list(official.items()), len(official)))

        edit(folder, change)

    def add_fields(self, folder):
        def change(official):
            for row in official.values():
                row["unknown"] = [{"deep": None}]

        edit(folder, change)


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [("STRASSE", "straße", False), ("Yes...", "yes", True), ("No .", "no", False), ("yes\n", "yes", False), ("", "", True)],
)
def test_full_stops_at_the_end_and_capitals_are_forgiven_and_nothing_else(tmp_path, text, answer, right):
    official = json.loads((FIXTURES / "gqa" / OFFICIAL).read_text())
    name, row = next(iter(official.items()))
    (tmp_path / OFFICIAL).write_text(json.dumps({name: {**row, "answer": answer}}))
    answers = write_lines(tmp_path / "a.jsonl", [{"question_id": name, "text": text}])
    assert score_of("gqa", tmp_path, answers).score == 100.0 * right


def test_questions_that_are_not_balanced_are_asked_and_not_counted(tmp_path):
    official = json.loads((FIXTURES / "gqa" / OFFICIAL).read_text())
    answers = lines_of(FIXTURES / "gqa" / "predictions.jsonl")
    for row in list(official.values())[10:]:
        row["isBalanced"] = False
    (tmp_path / OFFICIAL).write_text(json.dumps(official))
    score = score_of("gqa", tmp_path, write_lines(tmp_path / "a.jsonl", answers))
    assert score.metrics["scored"] == 10
    assert score.score == 100 * sum(r.score for r in score.readings[:10]) / 10
    whole = score_of("gqa", FIXTURES, tmp_path / "a.jsonl", "lmms-eval")
    assert score_of("gqa", tmp_path, tmp_path / "a.jsonl", "lmms-eval").metrics == whole.metrics
    with pytest.raises(DataError, match="no answer"):
        score_of("gqa", tmp_path, write_lines(tmp_path / "a.jsonl", answers[:10]))


def test_of_two_answers_to_a_question_the_last_counts(tmp_path):
    lines = lines_of(FIXTURES / "gqa" / "predictions.jsonl")
    twice = [{**line, "text": "nothing"} for line in lines] + lines
    before = score_of("gqa", FIXTURES, FIXTURES / "gqa" / "predictions.jsonl")
    after = score_of("gqa", FIXTURES, write_lines(tmp_path / "a.jsonl", twice))
    assert after.metrics == before.metrics
