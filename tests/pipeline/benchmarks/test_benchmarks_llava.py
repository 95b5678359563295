"""A question file of the user's own is a benchmark: scored by the metrics of ``alignkd evaluate``."""

from __future__ import annotations

import json

import pytest
from benchmark_conformance import FIXTURES, lines_of, score_of, write_lines

from alignkd.errors import ConfigError, DataError
from alignkd.pipeline.data.samples import SampleFile
from alignkd.pipeline.evaluate.benchmarks.llava import LlavaQuestions
from alignkd.pipeline.evaluate.benchmarks.registry import open_benchmark
from alignkd.pipeline.evaluate.metrics import METRICS

FOLDER = FIXTURES / "llava"
DATA, ANSWERS = FOLDER / "questions.json", FOLDER / "predictions.jsonl"


def record(name, asked="What?", answer="That"):
    return {"id": name, "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]}


def test_answers_are_scored_by_the_metrics_of_evaluate():
    score = score_of("llava", FIXTURES, ANSWERS)
    right = {reading.question.question_id: reading.score for reading in score.readings}
    assert right == {"q1": 1, "q2": 0, "q3": 1, "q4": 1, "q5": 0, "q6": 1}
    assert score.score == pytest.approx(100 * 4 / 6)
    expected = [record["conversations"][-1]["value"] for record in json.loads(DATA.read_text())]
    pairs = [(line["text"], answer) for line, answer in zip(lines_of(ANSWERS), expected, strict=True)]
    for name, compare in METRICS.items():
        assert score.metrics[name] == pytest.approx(100 * sum(compare(*pair) for pair in pairs) / 6)


def test_turns_are_those_of_the_file_up_to_the_last_answer():
    questions, file = open_benchmark("llava", FIXTURES).questions, SampleFile(DATA)
    assert len(questions) == len(file)
    for number, question in enumerate(questions):
        sample = file[number]
        assert question.turns == (*sample.turns[:-1], ("gpt", ""))
        assert (question.question_id, question.images, question.answers) == (sample.id, sample.images, (sample.turns[-1][1],))
    assert questions[2].text == "What is  here?"
    assert questions[5].prompt == "And <b>why</b>?"


def test_a_data_file_a_folder_and_a_metric_make_one(tmp_path):
    benchmark = LlavaQuestions.of(DATA, FOLDER, metric="contains", max_new_tokens=6)
    assert benchmark.missing_images() == []
    assert benchmark.read_image("a.jpg") == (FOLDER / "a.jpg").read_bytes()
    assert (benchmark.max_new_tokens, benchmark.settings) == (6, {"metric": "contains"})
    assert LlavaQuestions.of(DATA, tmp_path).missing_images() == ["a.jpg", "b.jpg"]
    with pytest.raises(ConfigError, match="known are exact, contains"):
        LlavaQuestions.of(DATA, FOLDER, metric="nearly")


def test_records_that_cannot_be_used_are_told_apart(tmp_path):
    human_last = {"id": "c", "conversations": [{"from": "human", "value": "What?"}]}
    broken, empty = {"id": "b", "conversations": 3}, record("d", answer=" . ")
    data = tmp_path / "questions.json"
    data.write_text(json.dumps([record("a"), broken, human_last, empty]))
    benchmark = LlavaQuestions.of(data, tmp_path)
    assert [question.question_id for question in benchmark.questions] == ["a"]
    assert [name for name, _ in benchmark.rejected] == ["b", "c", "d"]
    with pytest.raises(DataError, match="3 records cannot be used"):
        open_benchmark("llava", tmp_path)
    data.write_text(json.dumps([human_last]))
    with pytest.raises(DataError, match="none of its records"):
        LlavaQuestions.of(data, tmp_path)


def test_answers_are_matched_by_unique_ids_alone(tmp_path):
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(record(name)) + "\n" for name in ("a", "b")))
    one = write_lines(tmp_path / "a.jsonl", [{"question_id": "b", "text": "that."}])
    score = score_of("llava", tmp_path, one)
    assert (score.score, score.notes) == (100.0, ("1 of 2 questions have no answer: not counted",))
    (tmp_path / "questions.jsonl").write_text(2 * (json.dumps(record("a")) + "\n"))
    with pytest.raises(DataError, match="not unique"):
        score_of("llava", tmp_path, one)


def test_a_folder_without_questions_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"questions.json or questions.jsonl"):
        open_benchmark("llava", tmp_path)
