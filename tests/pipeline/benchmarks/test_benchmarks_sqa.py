"""ScienceQA keeps the promises of a benchmark, and LLaVA's rules."""

from __future__ import annotations

import json
import random
import re

import pytest
from benchmark_conformance import FIXTURES, BenchmarkConformance, lines_of, score_of, write_lines

from alignkd.errors import DataError
from alignkd.pipeline.evaluate.benchmarks.registry import open_benchmark
from alignkd.pipeline.evaluate.benchmarks.sqa import read_letter


class TestScienceQa(BenchmarkConformance):
    name = "sqa"
    official = ("problems.json", "pid_splits.json")
    question_files = ("llava_test_CQM-A.json",)
    error_cases = {  # noqa: RUF012
        "question_id written as integers": lambda folder, lines: [
            {**line, "question_id": int(line["question_id"])} for line in lines
        ],
        "prompts without the <image> marker": lambda folder, lines: [
            {**line, "prompt": line["prompt"].replace("<image>\n", "")} for line in lines
        ],
        "no question with a picture is answered": lambda folder, lines: [
            line for line in lines if "<image>" not in line["prompt"]
        ],
    }
    counted_cases = {"half of the answers": (lambda folder, lines: lines[:13], "13 of 26 questions have no answer")}  # noqa: RUF012

    def readings(self, expected, protocol):
        for line in expected["per_question"]:
            fields = {"prediction": line["text"]}
            if protocol == "mobilevlm":
                fields |= {"parsed": line["parsed"], "score": float(line["correct"]), "counted": line["counted_as_img"]}
                yield line["question_id"], fields
            elif line["image"]:
                score = line["lmms_eval"]
                yield line["question_id"], fields | {"score": score or 0.0, "counted": score is not None}

    def shuffle(self, folder):
        problems = json.loads((folder / "problems.json").read_text())
        problems = dict(random.Random(0).sample(list(problems.items()), len(problems)))
        (folder / "problems.json").write_text(json.dumps(problems))
        splits = json.loads((folder / "pid_splits.json").read_text())
        random.Random(1).shuffle(splits["test"])
        (folder / "pid_splits.json").write_text(json.dumps(splits))

    def add_fields(self, folder):
        for name in self.official:
            value = json.loads((folder / name).read_text())
            if name == "problems.json":
                for row in value.values():
                    row["unknown"] = 1
            value["unknown"] = {"question": None} if name == "problems.json" else ["4"]
            (folder / name).write_text(json.dumps(value))

    def edit_question_file(self, path):
        records = json.loads(path.read_text())
        records[0]["conversations"][0]["value"] = "<image>\nWhy?\nA. So\nB. No"
        path.write_text(json.dumps(records))


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *[(letter, letter) for letter in "ABCDE"],
        *[
            ("F", "FAILED"),
            ("a", "FAILED"),
            (" A", "FAILED"),
            ("A.", "FAILED"),
            ("A. ", "A"),
            ("A. x", "A"),
            ("F. x", "FAILED"),
        ],
        *[("The answer is B", "FAILED"), ("The answer is B.", "B"), ("The answer is B\n", "FAILED"), ("The answer is Z!", "Z")],
        *[("The answer is A. The answer is A.", "FAILED"), ("A. The answer is B.", "A"), ("So: The answer is Cat", "C")],
    ],
)
def test_a_letter_is_read_by_the_first_rule_that_applies(text, letter):
    assert read_letter(text) == letter


def test_integer_ids_are_named_as_the_reason(tmp_path):
    lines = lines_of(FIXTURES / "sqa" / "predictions.jsonl")
    answers = write_lines(tmp_path / "a.jsonl", [{**line, "question_id": int(line["question_id"])} for line in lines])
    with pytest.raises(DataError, match="whole numbers"):
        score_of("sqa", FIXTURES, answers)


def test_lmms_eval_asks_questions_with_a_picture_alone_in_its_own_words():
    expected = json.loads((FIXTURES / "sqa" / "expected.json").read_text())["lmms_eval_prompts"]
    questions = {question.question_id: question for question in open_benchmark("sqa", FIXTURES, "lmms-eval").questions}
    assert {name: questions[name].text for name in expected} == expected
    assert len(questions) == 18
    assert all(question.images for question in questions.values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda row: row | {"answer": 9}, "'answer' is 9"),
        (lambda row: row | {"answer": True}, "'answer' is true or false"),
        (lambda row: row | {"choices": list("ABCDEF")}, "6 choices"),
        (lambda row: row | {"choices": [], "answer": 0}, "0 choices"),
        (lambda row: row | {"image": 3}, "'image' is 3"),
    ],
)
def test_a_problem_that_cannot_be_scored_is_named(tmp_path, change, words):
    problems = json.loads((FIXTURES / "sqa" / "problems.json").read_text())
    problems["76"] = change(problems["76"])
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_bytes((FIXTURES / "sqa" / "pid_splits.json").read_bytes())
    with pytest.raises(DataError, match=re.escape(f"question '76': {words}")):
        open_benchmark("sqa", tmp_path)


def test_test_questions_without_a_problem_are_refused(tmp_path):
    problems = json.loads((FIXTURES / "sqa" / "problems.json").read_text())
    del problems["8"], problems["76"]
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_bytes((FIXTURES / "sqa" / "pid_splits.json").read_bytes())
    with pytest.raises(DataError, match=re.escape("lacks 2 of the 26 test questions")):
        open_benchmark("sqa", tmp_path)
