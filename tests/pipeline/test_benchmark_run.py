"""``alignkd benchmark run``: several processes, kills, resumption, and what is refused before a model is loaded."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from tiny_runs import STUDENT, TEACHER, wait_until

from alignkd.errors import TransientError
from alignkd.pipeline.evaluate.benchmarks.contract import Question
from alignkd.pipeline.evaluate.running.answering import Answered
from alignkd.pipeline.evaluate.running.parts import Parts
from alignkd.pipeline.runtime.ranks import Worker

BENCHMARKS = Path(__file__).parents[1] / "data" / "benchmarks"
TIMED = ("seconds", "questions_per_second")


def words(out, *more, benchmark="gqa", root=BENCHMARKS, model=STUDENT):
    given = {"--model": model, "--benchmark": benchmark, "--root": root, "--out": out, "--device": "cpu"}
    return ["benchmark", "run", *(word for pair in given.items() for word in pair), *more]


def result(out, name="gqa"):
    found = json.loads((out / name / "result.json").read_text())
    return {key: value for key, value in found.items() if key not in TIMED}


def lines(out, file, name="gqa"):
    return [json.loads(line) for line in (out / name / file).read_text().splitlines()]


def parts(out, name="gqa"):
    return {path.name: path.read_bytes().count(b"\n") for path in (out / name / "parts").glob("answers-*")}


@pytest.fixture(scope="module")
def whole(door, tmp_path_factory):
    """A run of one process that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "out"
    finished = door(*words(out, "--limit", 9, "--json"))
    assert finished.code == 0, finished.stderr
    return out, json.loads(finished.stdout)


def same(out, whole):
    assert result(out) == result(whole)
    for file in ("answers.jsonl", "predictions.jsonl"):
        assert lines(out, file) == lines(whole, file)


def test_a_run_writes_answers_predictions_and_the_result_with_every_setting(whole):
    out, printed = whole
    (found,) = printed["results"]
    assert found == json.loads((out / "gqa" / "result.json").read_text())
    assert (found["questions"], found["answered"], found["protocol"], found["unit"]) == (9, 9, "mobilevlm", "percent")
    settings = found["settings"]
    assert (settings["max_new_tokens"], settings["dtype"], settings["template"]) == (128, "float32", "v1")
    assert (settings["image_treatment"], settings["limit"]) == ("pad", 9)
    assert (found["model"], found["folder"]) == (str(STUDENT), str(BENCHMARKS / "gqa"))
    asked = json.loads((BENCHMARKS / "gqa" / "testdev_balanced_questions.json").read_text())
    questions = [json.loads(line) for line in (BENCHMARKS / "gqa" / "llava_gqa_testdev_balanced.jsonl").open()][:9]
    assert [line["question_id"] for line in lines(out, "answers.jsonl")] == [q["question_id"] for q in questions]
    assert [line["answers"] for line in lines(out, "predictions.jsonl")] == [
        [asked[q["question_id"]]["answer"]] for q in questions
    ]
    assert set(lines(out, "answers.jsonl")[0]) == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    assert json.loads((out / "run.json").read_text())["configuration"]["protocol"] == "mobilevlm"
    assert not (out / "run.lock").exists()


@pytest.mark.processes
def test_two_processes_answer_a_share_each_and_the_last_one_scores(door, tmp_path, monkeypatch, whole):
    out = tmp_path / "out"
    monkeypatch.setenv("WORLD_SIZE", "2")
    started = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        started.append(door.start(*words(out, "--limit", 9, "--json")))
    finished = [running.finish() for running in started]
    assert [f.code for f in finished] == [0, 0], [f.stderr for f in finished]
    assert any(json.loads(f.stdout)["results"] for f in finished)
    same(out, whole[0])
    counts = parts(out)
    assert set(counts) == {"answers-0-of-2.jsonl", "answers-1-of-2.jsonl"}
    assert sum(counts.values()) == 9
    assert all(counts.values())


@pytest.mark.slow
@pytest.mark.processes
def test_a_run_that_is_killed_at_any_moment_continues_to_the_same_result(door, tmp_path, monkeypatch, whole):
    out, command = tmp_path / "out", ["--limit", 9, "--batch-tokens", 1]
    running = door.start(*words(out, *command))
    wait_until(lambda: parts(out).get("answers-0-of-1.jsonl", 0) >= 2)
    os.kill(running.pid, signal.SIGKILL)
    running.finish()
    path = out / "gqa" / "parts" / "answers-0-of-1.jsonl"
    before = path.read_bytes().splitlines(keepends=True)
    assert not (out / "gqa" / "result.json").exists()
    path.write_bytes(b"".join(before) + b'{"index": 8, "question_id": "torn')

    monkeypatch.setenv("WORLD_SIZE", "2")  # the second of two alone, which is killed too
    monkeypatch.setenv("RANK", "1")
    running = door.start(*words(out, *command))
    wait_until(lambda: parts(out).get("answers-1-of-2.jsonl", 0) >= 1)
    os.kill(running.pid, signal.SIGKILL)
    running.finish()
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")

    kept = sum(parts(out).values())
    finished = door(*words(out, *command))
    assert finished.code == 0, finished.stderr
    assert f"{kept} of 9 questions are answered already" in finished.stderr
    same(out, whole[0])
    assert sum(parts(out).values()) == 9
    assert path.read_bytes().startswith(b"".join(before))


@pytest.mark.slow
@pytest.mark.processes
def test_a_run_that_is_asked_to_stop_says_so_and_holds_its_folder_until_then(door, tmp_path):
    out, command = tmp_path / "out", ["--batch-tokens", 1]
    running = door.start(*words(out, *command))
    wait_until(lambda: parts(out).get("answers-0-of-1.jsonl", 0) >= 1)
    second = door(*words(out, *command))
    assert (second.code, "is in use by another run" in second.stderr) == (2, True)
    os.kill(running.pid, signal.SIGTERM)
    stopped = running.finish()
    assert (stopped.code, "run the same command again to continue" in stopped.stderr) == (75, True)
    assert not (out / "run.lock").exists()


def refused(door, *command, code=2):
    finished = door(*command)
    assert (finished.code, "Traceback" in finished.stderr) == (code, False), finished.stderr
    return finished.stderr


def test_missing_pictures_of_all_benchmarks_are_named_before_the_model_is_loaded(door, tmp_path):
    root = tmp_path / "root"
    for name in ("gqa", "textvqa"):
        shutil.copytree(BENCHMARKS / name, root / name)
    gone = sorted((root / "gqa" / "images").glob("*.jpg"))[:7] + sorted((root / "textvqa" / "train_images").glob("*"))[:1]
    for path in gone:
        path.unlink()
    words_ = refused(door, *words(tmp_path / "out", benchmark="gqa,textvqa", root=root, model=tmp_path))
    assert "8 pictures are missing" in words_
    assert "and 2 more" in words_
    assert f"TextVQA: train_images/{gone[-1].name}" in words_
    assert "licence" in words_
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"benchmark": "gqa,quiz"}, "known are gqa"),
        ({"benchmark": ","}, "names none"),
        ({"root": "nowhere"}, "is not a folder"),
        ({"benchmark": "sqa", "root": BENCHMARKS / "gqa"}, "lacks"),
        ({"model": "nowhere"}, "nowhere"),
    ],
)
def test_bad_input_is_one_message(door, tmp_path, changed, message):
    assert message in refused(door, *words(tmp_path / "out", **changed))


def test_a_file_as_out_is_refused(door, tmp_path):
    (tmp_path / "out").touch()
    assert "is a file" in refused(door, *words(tmp_path / "out"))


def test_answers_are_never_continued_with_another_model_or_other_settings(door, tmp_path, whole):
    out = shutil.copytree(whole[0], tmp_path / "out")
    before = result(out)
    for more, what in (
        (["--limit", 9, "--model", TEACHER], "weights_sha256 is "),
        (["--limit", 9, "--dtype", "bfloat16"], "dtype is 'bfloat16', the answers there have 'float32'"),
        (["--limit", 9, "--template", "plain"], "template is 'plain', the answers there have 'v1'"),
        (["--limit", 9, "--protocol", "lmms-eval"], "protocol is 'lmms-eval'"),
        (["--limit", 8], "questions is 8, the answers there have 9"),
    ):
        assert what in refused(door, *words(out, *more))
    assert result(out) == before
    again = door(*words(out, "--limit", 9, "--batch-tokens", 900))
    assert (again.code, "9 of 9 questions are answered already" in again.stderr) == (0, True)
    assert result(out) == before


def test_people_read_the_score_with_its_protocol(door, tmp_path, whole):
    finished = door(*words(shutil.copytree(whole[0], tmp_path / "out"), "--limit", 9))
    assert "GQA" in finished.stdout
    assert "9 questions, mobilevlm" in finished.stdout


def test_a_full_disk_is_one_message_and_the_run_can_go_on(tmp_path, monkeypatch):
    question = Question("q", "What?", "What?")
    parts = Parts(tmp_path / "parts", [question])

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with parts.writer(Worker()) as write:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(TransientError, match=r"answers-0-of-1\.jsonl cannot be written to .*No space left on device"):
                write([Answered(0, "lost", 0.1)])
        write([Answered(0, "kept", 0.1)])
    assert parts.read() == {0: Answered(0, "kept", 0.1)}


@pytest.mark.parametrize(
    "line", ["[]", "{}", '{"index": 9}', '{"index": true, "question_id": "q", "text": "", "seconds": 0}', "\ufeff"]
)
def test_a_line_of_a_part_that_answers_no_question_is_answered_again(tmp_path, line):
    parts = Parts(tmp_path, [Question("q", "", ""), Question("r", "", "")])
    good = {"index": 1, "question_id": "r", "text": "yes", "seconds": 0}
    other = {**good, "question_id": "q"}
    (tmp_path / "answers-0-of-3.jsonl").write_text(
        "\n".join([line, json.dumps(other), json.dumps(good), json.dumps(good)[:-3]])
    )
    assert parts.read() == {1: Answered(1, "yes", 0.0)}
