"""``alignkd benchmark score``: one JSON object, one message for bad input, and no torch."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from test_cli_imports import loaded

FIXTURES = Path(__file__).resolve().parents[1] / "data" / "benchmarks"
NAMES = sorted(folder.name for folder in FIXTURES.iterdir() if folder.is_dir())
GQA = FIXTURES / "gqa"


def score(door, *words, name="gqa", root=FIXTURES, answers=None):
    answers = answers or Path(root) / name / "predictions.jsonl"
    return door("benchmark", "score", "--benchmark", name, "--root", root, "--answers", answers, *words)


@pytest.mark.parametrize("name", NAMES)
def test_scoring_loads_no_torch(name):
    answers = FIXTURES / name / "predictions.jsonl"
    for protocol in ("mobilevlm", "lmms-eval"):
        command = ["benchmark", "score", "--benchmark", name, "--root", FIXTURES, "--answers", answers, "--protocol", protocol]
        assert list(loaded(command).values()) == [[]]


def test_json_is_one_object_with_the_score_and_all_metrics(door):
    finished = score(door, "--json")
    assert (finished.code, finished.stderr) == (0, "")
    found = json.loads(finished.stdout)
    assert (found["benchmark"], found["protocol"], found["unit"]) == ("gqa", "mobilevlm", "percent")
    assert (found["score"], found["questions"], found["answered"]) == (40.0, 40, 40)
    assert found["metrics"]["per_structural_type"]["verify"] == {"accuracy": 75.0, "questions": 4}
    assert set(found) >= {"notes", "settings"}


def test_root_may_be_the_benchmarks_own_folder_and_the_protocol_is_chosen(door):
    finished = score(door, "--json", "--protocol", "lmms-eval", root=GQA, answers=GQA / "predictions.jsonl")
    assert json.loads(finished.stdout)["metrics"] == {"exact_match": 0.5}


def test_words_for_people_begin_with_the_score_and_its_notes(door):
    lines = score(door, name="textvqa").stdout.splitlines()
    assert lines[0].split() == ["TextVQA", "79.09", "%", "33", "questions,", "mobilevlm"]
    assert lines[1].strip() == "prompts hold OCR tokens"
    assert ["samples", "33"] in [line.split() for line in lines]


@pytest.mark.parametrize("name", NAMES)
def test_words_for_people_hold_every_metric_on_short_lines(door, name):
    finished = score(door, name=name)
    metrics = json.loads(score(door, "--json", name=name).stdout)["metrics"]
    words = {line.split()[0] for line in finished.stdout.splitlines()}
    assert set(metrics) <= words
    assert finished.code == 0


def test_lines_that_are_not_used_are_counted(door, tmp_path):
    lines = (GQA / "predictions.jsonl").read_text()
    other = {"question_id": "another", "prompt": "What?", "text": "\u202eno\x1b[2J"}
    (tmp_path / "a.jsonl").write_text(lines + json.dumps(other) + "\n" + lines)
    found = json.loads(score(door, "--json", answers=tmp_path / "a.jsonl").stdout)
    assert found["score"] == 40.0
    assert found["notes"] == [
        "41 lines of the answer file are not used (the first: 1, 2, 3): another question, or answered again"
    ]


def test_out_holds_the_result_and_a_line_on_each_question(door, tmp_path):
    finished = score(door, "--json", "--out", tmp_path / "result.json")
    written = json.loads((tmp_path / "result.json").read_text())
    lines = written.pop("predictions")
    assert written == json.loads(finished.stdout)
    assert len(lines) == 40
    assert lines[3] == {
        "id": "20686749",
        "question": "Are there any horses or cows?\nAnswer the question using a single word or phrase.",
        "image": lines[3]["image"],
        "prediction": "No .",
        "parsed": "no ",
        "answers": ["no"],
        "score": 0.0,
        "category": "logical",
        "counted": True,
    }
    assert list(tmp_path.iterdir()) == [tmp_path / "result.json"]


def refused(finished, *words):
    assert (finished.code, finished.stdout) == (2, ""), finished.stdout
    assert finished.stderr.startswith("Error: ")
    assert "Traceback" not in finished.stderr
    for word in words:
        assert word in finished.stderr


def test_bad_input_is_one_message_and_exit_code_2(door, tmp_path):
    good = GQA / "predictions.jsonl"
    refused(score(door, name="vqa", answers=good), "known are gqa, sqa, textvqa")
    refused(score(door, root=tmp_path / "none", answers=good), "is not a folder")
    refused(score(door, root=tmp_path, answers=good), "testdev_balanced_questions.json", "gqa/download.html", "licence")
    refused(score(door, root=FIXTURES / "sqa", answers=good), "testdev_balanced_questions.json")
    refused(score(door, answers=tmp_path / "none.jsonl"), "No such file")
    refused(score(door, answers=tmp_path), "a directory")
    refused(score(door, "--out", tmp_path / "no" / "result.json"), "--out")
    (tmp_path / "a.jsonl").write_text('{"question_id": "20686617", "text": "no"}\n')
    refused(score(door, answers=tmp_path / "a.jsonl"), "39 of the 40 questions")
    for text, words in (
        ("", "holds no answers"),
        ("[1]\n", "line 1"),
        ('{"question_id": 1.5, "text": "a"}\n', "'question_id'"),
        ('{"question_id": "1"}\n', "'text'"),
        ('{"question_id": "1", "text": "a", "prompt": null}\n', "'prompt'"),
        ('{"question_id": "1", "text": "\\ud800"}\n', "answers none of the 40 questions"),
    ):
        (tmp_path / "a.jsonl").write_text(text)
        refused(score(door, answers=tmp_path / "a.jsonl"), words)


def test_a_named_pipe_as_question_file_is_refused_and_not_waited_for(door, tmp_path):
    folder = shutil.copytree(FIXTURES / "pope", tmp_path / "pope")
    (folder / "llava_pope_test.jsonl").unlink()
    os.mkfifo(folder / "llava_pope_test.jsonl")
    refused(score(door, name="pope", root=tmp_path), "a named pipe")


def test_halves_of_surrogate_pairs_are_scored_and_written(door, tmp_path):
    official = json.loads((GQA / "testdev_balanced_questions.json").read_text())
    hostile = {f"\ud800\x1b[2J{name}": row | {"answer": "\udfff", "question": "\u202e\ud800"} for name, row in official.items()}
    (tmp_path / "testdev_balanced_questions.json").write_text(json.dumps(hostile))
    lines = [json.dumps({"question_id": name, "text": "\udfff."}) + "\n" for name in hostile]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    finished = score(door, "--json", "--out", tmp_path / "result.json", root=tmp_path, answers=tmp_path / "a.jsonl")
    assert json.loads(finished.stdout)["score"] == 100.0
    written = json.loads((tmp_path / "result.json").read_text())["predictions"]
    assert [line["id"] for line in written] == list(hostile)
    (tmp_path / "a.jsonl").write_text("".join(lines[1:]))
    finished = score(door, root=tmp_path, answers=tmp_path / "a.jsonl")
    refused(finished, "1 of the 40 questions of GQA")
    assert "\x1b" not in finished.stderr
