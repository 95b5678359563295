"""Accuracy by generation: each image is encoded once, and nothing depends on the batches."""

from __future__ import annotations

import errno
import io
import json
import os
import re
from pathlib import Path

import pytest
from tiny_runs import IMAGES, SAMPLES, STUDENT, record, write_data

from alignkd.errors import ConfigError, DataError, TransientError
from alignkd.pipeline.config.evaluate import EvaluateConfig
from alignkd.pipeline.data.rejected_samples import TooManyRejectedError
from alignkd.pipeline.evaluate import runner
from alignkd.pipeline.evaluate.metrics import contains, exact
from alignkd.pipeline.evaluate.runner import evaluate
from alignkd.pipeline.evaluate.running import batches
from alignkd.pipeline.evaluate.statistics import wilson_interval
from alignkd.pipeline.runtime.out_folder.lock import held


def question(name, image, text="<image>\nWhat is it?"):
    return record(name, image, text, "A thing.")


# Many questions about two images, one without an image and one about both.
QUESTIONS = [
    question("a0", "0.png"),
    question("b0", "1.png", "<image>\nWhich colour does it have?"),
    question("a1", "0.png", "Where is <image> it?"),
    SAMPLES[4],
    question("a2", "0.png", "<image>\nWhy?"),
    question("both", ["0.png", "1.png"], "<image>\n<image>\nWhich?"),
    question("b1", "1.png"),
]


def run(tmp_path, records, name="out", **changes):
    data = write_data(tmp_path / f"{name}.json", records)
    config = EvaluateConfig(
        model=str(STUDENT), data=str(data), images=str(IMAGES), out=str(tmp_path / name), max_new_tokens=6, device="cpu"
    )
    result = evaluate(EvaluateConfig(**{**vars(config), **changes}))
    lines = (tmp_path / name / "predictions.jsonl").read_text().splitlines()
    return result, {line["id"]: line["prediction"] for line in map(json.loads, lines)}


@pytest.fixture
def encoded(monkeypatch):
    """Number of images of each call of the tower."""
    from alignkd.models.modules.mobilevlm import MobileVlmModel

    calls, real = [], MobileVlmModel.run_tower
    monkeypatch.setattr(MobileVlmModel, "run_tower", lambda self, pixels: calls.append(len(pixels)) or real(self, pixels))
    return calls


def test_predictions_are_those_of_one_question_at_a_time(tmp_path):
    alone = run(tmp_path, QUESTIONS, "alone", batch_size=1)
    for size in (3, 7):
        together = run(tmp_path, QUESTIONS, f"by{size}", batch_size=size)
        assert together == alone
    assert list(alone[1]) == ["a0", "b0", "a1", "text4", "a2", "both", "b1"]
    assert len(set(alone[1].values())) > 1


def test_each_image_goes_through_the_tower_once(tmp_path, encoded):
    run(tmp_path, QUESTIONS, batch_size=7)
    assert encoded == [2]
    encoded.clear()
    run(tmp_path, QUESTIONS, "again", batch_size=3)
    assert encoded == [2]


def test_what_questions_of_a_batch_about_one_picture_begin_with_is_computed_once(tmp_path, monkeypatch):
    shared, real = [], batches.share_prompts
    monkeypatch.setattr(batches, "share_prompts", lambda vlm, some: shared.append(len(some)) or real(vlm, some))
    together = run(tmp_path, QUESTIONS, batch_size=7)
    assert shared == [2]
    assert together == run(tmp_path, QUESTIONS, "alone", batch_size=1)
    assert shared == [2]


def test_a_batch_of_text_alone_needs_no_tower(tmp_path, encoded):
    result, _ = run(tmp_path, [SAMPLES[4]])
    assert (result["answered"], encoded) == (1, [])


def test_images_that_cannot_be_read_are_rejected_by_name_and_the_others_answered_as_before(tmp_path):
    bad = [question("gone", "none.png"), question("half", ["0.png", "none.png"], "<image><image>\nWhich?")]
    result, predictions = run(tmp_path, [*QUESTIONS[:2], *bad, *QUESTIONS[2:]], batch_size=4)
    assert set(result["rejected_samples"]) == {"gone", "half"}
    assert all("none.png: No such file" in reason for reason in result["rejected_samples"].values())
    assert (result["answered"], result["rejected"]) == (7, 2)
    assert predictions == run(tmp_path, QUESTIONS, "without")[1]


def test_a_batch_of_which_nothing_can_be_read_is_passed_over(tmp_path):
    result, predictions = run(tmp_path, [question("gone", "none.png"), QUESTIONS[0]], batch_size=1)
    assert (list(predictions), result["rejected"]) == (["a0"], 1)


def test_more_unreadable_questions_than_allowed_end_the_evaluation(tmp_path):
    with pytest.raises(TooManyRejectedError, match=r"2 samples cannot be used, more than --max-rejected 1.*gone0.*none.png"):
        run(tmp_path, [question(f"gone{i}", "none.png") for i in range(2)], max_rejected=1)


@pytest.mark.parametrize(
    ("metric", "prediction", "answer", "right"),
    [
        (exact, " Yes.", "yes", True),
        (exact, "yes it is", "yes", False),
        (contains, "I think YES it is", "yes.", True),
        (contains, "no", "yes", False),
    ],
)
def test_metrics_compare_words(metric, prediction, answer, right):
    assert metric(prediction, answer) is right


def test_the_interval_is_wilsons():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    low, high = wilson_interval(8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))


@pytest.mark.parametrize("reference", ["", ".", " ", " . ", "...", "\n", "\u00a0", "\u200b", "\ufeff."])
def test_an_empty_reference_is_no_match(reference):
    for prediction in ("", ".", reference, "anything"):
        assert not exact(prediction, reference)
        assert not contains(prediction, reference)


@pytest.mark.parametrize("reference", ["?", "+", "0", "no.", "\U0001f600", "é"])
def test_a_short_reference_is_still_one(reference):
    assert exact(reference, reference)
    assert contains(f"it is {reference}", reference)


@pytest.mark.parametrize("metric", ["exact", "contains"])
def test_a_sample_with_an_empty_reference_is_rejected_by_name(tmp_path, metric):
    empty = [record(f"empty{i}", "0.png", "<image>\nWhat is it?", text) for i, text in enumerate(["", ".", " ", "\u200b"])]
    result, predictions = run(tmp_path, [*empty, question("good", "1.png")], metric=metric)
    assert (result["answered"], result["rejected"], list(predictions)) == (1, 4, ["good"])
    assert set(result["rejected_samples"]) == {"empty0", "empty1", "empty2", "empty3"}
    assert all("nothing to compare" in why for why in result["rejected_samples"].values())


def test_samples_that_are_all_rejected_are_a_failure(tmp_path):
    with pytest.raises(DataError, match=r"none of 2 samples can be used: 2 text. First: a: its last answer is ''"):
        run(tmp_path, [record("a", None, "What?", ""), record("b", None, "What?", ".")])
    assert not (tmp_path / "out" / "result.json").exists()


def test_predictions_are_on_disk_before_the_next_batch_is_generated(tmp_path, monkeypatch):
    written, real = [], batches.halving

    def answer(*arguments):
        written.append(len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()))
        if len(written) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(batches, "halving", answer)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, QUESTIONS, batch_size=2)
    assert written == [0, 2, 4]
    assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == 4


def test_a_prediction_says_what_was_asked_about_which_image_and_what_was_expected(tmp_path):
    ids = ["\ud800", "one\u2028two\x85three", "\x1b[2J", "a"]
    records = [
        question(ids[0], "0.png"),
        record(ids[1], None, "First?", "Yes.", "And then?", "No\u2029."),
        question(ids[2], ["0.png", "1.png"], "<image>\n<image>\nWhich?"),
        question(ids[3], "1.png"),
    ]
    run(tmp_path, records)
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ids
    assert [line["image"] for line in lines] == ["0.png", None, ["0.png", "1.png"], "1.png"]
    assert [line["question"] for line in lines[:2]] == ["<image>\nWhat is it?", "And then?"]
    assert [line["reference"] for line in lines[:2]] == ["A thing.", "No\u2029."]
    assert all(line["answer"] == line["reference"] for line in lines)


@pytest.mark.parametrize("part", ["predictions.jsonl", "result.json"])
def test_a_full_disk_is_one_message_that_names_the_file_and_what_to_do(tmp_path, monkeypatch, part):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if part == "result.json":
        monkeypatch.setattr(runner, "replace_text", full)
    else:
        real = Path.open

        class Full(io.RawIOBase):
            write = full

        monkeypatch.setattr(Path, "open", lambda path, *a, **k: Full() if path.name == part else real(path, *a, **k))
    with pytest.raises(
        TransientError, match=rf"{part} cannot be written to .*No space left on device\. Free space there, then run"
    ):
        run(tmp_path, QUESTIONS[:1])


def test_a_folder_without_rights_is_refused_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "load_vlm", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr(os, "access", lambda path, mode: (Path(path), mode) != (tmp_path, os.W_OK | os.X_OK))
    with pytest.raises(ConfigError, match="cannot be written: change its rights"):
        run(tmp_path, QUESTIONS[:1])


def interrupted(tmp_path, monkeypatch, after=2, **changes):
    """A run that ends by force once some batches are answered, in the middle of a line."""
    calls, real = [], batches.halving

    def answer(*arguments):
        calls.append(arguments)
        if len(calls) > after:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(batches, "halving", answer)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, RECORDS, batch_size=2, **changes)
    with (tmp_path / "out" / "predictions.jsonl").open("ab") as file:
        file.write(b'{"id": "torn')


RECORDS = [QUESTIONS[0], question("gone", "none.png"), *QUESTIONS[1:]]


@pytest.mark.parametrize("batch_size", [2, 3, 64])
def test_an_interrupted_evaluation_continues_to_the_same_figures(tmp_path, monkeypatch, encoded, batch_size):
    whole = run(tmp_path, RECORDS, "whole")
    interrupted(tmp_path, monkeypatch)
    asked, real = [], batches.halving
    monkeypatch.setattr(batches, "halving", lambda ask, questions: asked.extend(questions) or real(ask, questions))
    again = run(tmp_path, RECORDS, batch_size=batch_size)
    assert again == whole
    assert len(asked) == 3  # two batches were there
    assert set(again[0]["rejected_samples"]) == {"gone"}
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("out", "whole")]
    assert names == [["predictions.jsonl", "result.json", "run.json"]] * 2


@pytest.mark.parametrize("changes", [{"max_new_tokens": 3}, {"dtype": "bfloat16"}, {"metric": "contains"}])
def test_predictions_of_other_settings_are_never_continued(tmp_path, monkeypatch, changes):
    interrupted(tmp_path, monkeypatch, **changes)
    asked, real = [], batches.halving
    monkeypatch.setattr(batches, "halving", lambda ask, questions: asked.extend(questions) or real(ask, questions))
    run(tmp_path, RECORDS)
    assert len(asked) == 7


def test_predictions_that_are_not_of_these_questions_are_named(tmp_path, monkeypatch):
    interrupted(tmp_path, monkeypatch)
    path = tmp_path / "out" / "predictions.jsonl"
    path.write_text(re.sub('"id": "[^"]+"', '"id": "z9"', path.read_text(), count=1))
    with pytest.raises(ConfigError, match=r"predictions\.jsonl holds predictions that are not of these questions .*'z9'"):
        run(tmp_path, RECORDS)


def test_one_folder_is_evaluated_into_by_one_run(tmp_path):
    with held(tmp_path / "out"), pytest.raises(ConfigError, match="is in use by another run"):
        run(tmp_path, QUESTIONS[:1])
