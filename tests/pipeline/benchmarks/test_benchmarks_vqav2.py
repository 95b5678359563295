"""VQAv2 keeps the promises of a benchmark, and the official scorer's rules."""

from __future__ import annotations

import json
import random

import pytest
from benchmark_conformance import FIXTURES, BenchmarkConformance, lines_of, score_of, write_lines

from alignkd.errors import DataError
from alignkd.pipeline.evaluate.benchmarks.registry import open_benchmark

QUESTIONS, ANNOTATIONS = "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"
ANSWERS = FIXTURES / "vqav2" / "predictions.jsonl"


def edit(path, name, change):
    value = json.loads(path.read_text())
    change(value[name])
    path.write_text(json.dumps(value))


def nine_answers(folder, lines):
    edit(folder / ANNOTATIONS, "annotations", lambda rows: rows[0]["answers"].pop())
    return lines


class TestVqaV2(BenchmarkConformance):
    name = "vqav2"
    official = (QUESTIONS, ANNOTATIONS)
    reference = "official"
    error_cases = {  # noqa: RUF012
        "half of the answers": lambda folder, lines: lines[::2],
        "an answer to no question": lambda folder, lines: [*lines, {**lines[0], "question_id": 1}],
        "ids written as texts": lambda folder, lines: [{**line, "question_id": str(line["question_id"])} for line in lines],
        "nine answers instead of ten": nine_answers,
    }
    # MobileVLM has no loader for it, so no reference says what its prompts and pictures are.
    test_prompts_are_those_of_the_reference_loader = None
    test_the_image_treatment_is_what_the_reference_loader_hands_to_the_processor = None

    def readings(self, expected, protocol):
        for line in expected["per_question"]:
            fields = {"prediction": line["text"], "counted": True}
            if protocol == "mobilevlm":
                fields |= {"score": line["score"]}
            else:
                fields |= {"score": line["lmms_eval"], "parsed": line["lmms_eval_normalised"]}
            yield str(line["question_id"]), fields

    def shuffle(self, folder):
        edit(folder / QUESTIONS, "questions", random.Random(0).shuffle)
        edit(folder / ANNOTATIONS, "annotations", random.Random(1).shuffle)

    def add_fields(self, folder):
        edit(folder / QUESTIONS, "questions", lambda rows: [row.update(unknown=[None]) for row in rows])
        edit(folder / ANNOTATIONS, "annotations", lambda rows: [row.update(unknown={"a": 1}) for row in rows])


def test_the_prompt_is_llavas():
    question = open_benchmark("vqav2", FIXTURES).questions[-1]
    assert question.turns[0] == ("human", f"<image>\n{question.text}")
    assert question.text.endswith("?\nAnswer the question using a single word or phrase.")


@pytest.mark.parametrize("name", [QUESTIONS, ANNOTATIONS])
def test_files_of_two_splits_are_refused(tmp_path, name):
    for other in (QUESTIONS, ANNOTATIONS):
        (tmp_path / other).write_bytes((FIXTURES / "vqav2" / other).read_bytes())
    rows = "questions" if name == QUESTIONS else "annotations"
    edit(tmp_path / name, rows, lambda rows: [row.update(image_id=row["image_id"] + 1) for row in rows])
    with pytest.raises(DataError, match="different splits"):
        open_benchmark("vqav2", tmp_path)


def test_where_people_agree_to_the_character_their_answer_is_left_as_it_is(tmp_path):
    lines = lines_of(ANSWERS)
    edit_folder = tmp_path / "vqav2"
    edit_folder.mkdir()
    for name in (QUESTIONS, ANNOTATIONS):
        (edit_folder / name).write_bytes((FIXTURES / "vqav2" / name).read_bytes())
    edit(edit_folder / ANNOTATIONS, "annotations", lambda rows: [answer.update(answer="Two.") for answer in rows[0]["answers"]])
    answers = write_lines(tmp_path / "a.jsonl", [{**line, "text": "Two."} for line in lines])
    name = json.loads((edit_folder / ANNOTATIONS).read_text())["annotations"][0]["question_id"]
    for protocol, worth in (("mobilevlm", 0.0), ("lmms-eval", 1.0)):
        score = score_of("vqav2", tmp_path, answers, protocol)
        assert {r.question.question_id: r.score for r in score.readings}[name] == worth
