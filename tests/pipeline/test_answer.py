"""``alignkd answer``: what a model writes becomes data, whatever the batches, the processes and the interruptions."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_shapes import write_parquet, write_webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import launched
from tiny_runs import IMAGES, SAMPLES, STUDENT, TEACHER, record, wait_until, write_data

from alignkd.errors import ConfigError, DataError
from alignkd.inputs.prompts import IGNORE
from alignkd.pipeline.answer.answering import last_supervised
from alignkd.pipeline.answer.run import answer
from alignkd.pipeline.config.answer import AnswerConfig
from alignkd.pipeline.config.evaluate import EvaluateConfig
from alignkd.pipeline.data.samples import SampleFile
from alignkd.pipeline.evaluate.drawing import DrawnTokens, uniform_numbers
from alignkd.pipeline.evaluate.runner import evaluate

SEVERAL_TURNS = record("turns", "1.png", "<image>\nWhat is it?", "A thing.", "And which colour?", "Red.")
OPEN = record("open", "2.png", "<image>\nWhy?")
# The fourth is the first again, and is answered once.
RECORDS = [*SAMPLES, SEVERAL_TURNS, OPEN, SAMPLES[0]]


def config_of(data, out, **changes) -> AnswerConfig:
    given_ = {"model": str(STUDENT), "data": str(data), "images": str(IMAGES), "out": str(out), "device": "cpu"}
    return AnswerConfig(**{**given_, "max_new_tokens": 6, "keep_cut": True, **changes})


def written(out: Path) -> list[dict]:
    return json.loads(out.read_text()) if out.suffix == ".json" else [json.loads(line) for line in out.read_text().splitlines()]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("records") / "records.json", RECORDS)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, records):
    """Three answers each at temperature 1, by one process that nothing interrupts."""
    out = tmp_path_factory.mktemp("drawn") / "answers.jsonl"
    return out, answer(config_of(records, out, temperature=1.0, n=3))


def test_greedy_answers_are_the_predictions_of_evaluate_in_the_order_of_the_file(tmp_path, records):
    out = tmp_path / "answers.jsonl"
    figures = answer(config_of(records, out))
    evaluate(
        EvaluateConfig(
            model=str(STUDENT),
            data=str(write_data(tmp_path / "asked.json", [r for r in RECORDS if r is not OPEN])),
            images=str(IMAGES),
            out=str(tmp_path / "evaluated"),
            max_new_tokens=6,
            device="cpu",
        )
    )
    predictions = [json.loads(line) for line in (tmp_path / "evaluated" / "predictions.jsonl").read_text().splitlines()]
    found = {line["id"]: line["conversations"][-1]["value"] for line in written(out)}
    assert [line["id"] for line in written(out)] == [r["id"] for r in RECORDS]
    assert {line["id"]: line["prediction"] for line in predictions} == {k: v for k, v in found.items() if k != "open"}
    assert (figures["complete"], figures["answers"], figures["samples"]) == (True, len(RECORDS), len(RECORDS))
    assert not list((tmp_path / "answers.jsonl.run").glob("answers-*"))


def test_all_but_the_last_answer_stays_and_the_answer_says_where_it_comes_from(drawn):
    out, figures = drawn
    lines = {line["id"]: line for line in written(out)}
    assert len(lines) == 3 * (len(RECORDS) - 1)  # of the identical samples, the answers have one id
    line = lines["turns#2"]
    assert line["conversations"][:-1] == SEVERAL_TURNS["conversations"][:-1]
    assert line["image"] == "1.png"
    assert lines["two5#1"]["image"] == ["0.png", "3.png"]
    assert "image" not in lines["text4#1"]
    assert lines["open#3"]["conversations"][:-1] == OPEN["conversations"]
    about = line["provenance"]
    assert (about["model"], about["weights"]) == (STUDENT.name, figures["weights_sha256"])
    expected = {"max_new_tokens": 6, "temperature": 1.0, "top_p": 1.0, "seed": 0, "dtype": "float32", "template": "v1"}
    assert about["settings"] == expected
    assert {line["provenance"]["finished"] for line in lines.values()} <= {True, False}
    assert len({line["conversations"][-1]["value"] for line in lines.values()}) > len(RECORDS)


def test_drawn_answers_do_not_depend_on_batches_or_order(tmp_path, drawn, records):
    one = tmp_path / "one.jsonl"
    answer(config_of(records, one, temperature=1.0, n=3, batch_tokens=1))
    assert one.read_bytes() == drawn[0].read_bytes()
    turned = tmp_path / "turned.jsonl"
    answer(config_of(write_data(tmp_path / "turned.json", RECORDS[::-1]), turned, temperature=1.0, n=3))
    assert sorted(turned.read_text().splitlines()) == sorted(drawn[0].read_text().splitlines())
    other = tmp_path / "other.jsonl"
    answer(config_of(records, other, temperature=1.0, n=3, seed=1))
    assert other.read_bytes() != drawn[0].read_bytes()


def test_the_answers_of_a_smaller_number_are_the_first_of_a_larger_one(tmp_path, drawn, records):
    out = tmp_path / "two.json"
    answer(config_of(records, out, temperature=1.0, n=2))
    assert written(out) == [line for line in written(drawn[0]) if not line["id"].endswith("#3")]


def test_the_file_is_data_that_every_command_reads(drawn):
    samples = SampleFile(drawn[0])
    assert (samples.faults, len(samples)) == (0, drawn[1]["answers"])


def command(data, out, *more):
    words = ["answer", "--model", STUDENT, "--data", data, "--images", IMAGES, "--out", out, "--device", "cpu"]
    return [*words, "--max-new-tokens", 6, "--keep-cut", "--temperature", 1, "--n", 3, "--json", *more]


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_write_the_same_file_as_one(door, tmp_path, monkeypatch, drawn, records):
    out = tmp_path / "answers.jsonl"
    with launched(door, monkeypatch, *command(records, out)) as running:
        finished = [one.finish() for one in running]
    assert [f.code for f in finished] == [0, 0], [f.stderr for f in finished]
    assert any(json.loads(f.stdout)["complete"] for f in finished)
    assert out.read_bytes() == drawn[0].read_bytes()


@pytest.mark.slow
@pytest.mark.processes
def test_a_run_that_is_killed_again_and_again_leaves_the_same_file(door, tmp_path, monkeypatch, drawn, records):
    out = tmp_path / "answers.jsonl"
    folder = tmp_path / "answers.jsonl.run"

    def lines():
        return sum(path.read_bytes().count(b"\n") for path in folder.glob("answers-*"))

    for kill in range(4):  # by one process, and by the second of two
        before = lines()
        with monkeypatch.context() as patch:
            if kill % 2:
                patch.setenv("WORLD_SIZE", "2")
                patch.setenv("RANK", "1")
            running = door.start(*command(records, out, "--batch-tokens", 1))
        wait_until(lambda before=before, pid=running.pid: lines() > before + 1 or out.exists() or not _alive(pid))
        os.kill(running.pid, signal.SIGKILL)
        running.finish()
        if kill == 1 and (parts := next(folder.glob("answers-*"), None)):
            with parts.open("ab") as file:
                file.write(b'{"index": 0, "torn')
    finished = door(*command(records, out, "--batch-tokens", 1))
    assert finished.code == 0, finished.stderr
    assert out.read_bytes() == drawn[0].read_bytes()
    assert not list(tmp_path.glob("*.part"))


def _alive(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_complete_file_is_not_written_again_and_never_by_another_run(tmp_path, drawn, records, monkeypatch):
    out, figures = drawn
    before = out.stat().st_mtime_ns
    assert answer(config_of(records, out, temperature=1.0, n=3)) == figures
    assert out.stat().st_mtime_ns == before
    for changes, message in (
        ({"model": str(TEACHER)}, "weights_sha256 is "),
        ({"seed": 1}, "seed is 1, there it is 0"),
        ({"keep_cut": False}, "with --keep-cut"),
    ):
        with pytest.raises(ConfigError, match=message):
            answer(config_of(records, out, temperature=1.0, n=3, **changes))
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text("mine")
    with pytest.raises(ConfigError, match="did not write it"):
        answer(config_of(records, foreign))
    assert foreign.read_text() == "mine"


def test_answers_that_are_cut_are_left_out_or_kept_and_named(tmp_path, records):
    out = tmp_path / "answers.jsonl"
    with pytest.raises(DataError, match=r"no answer is left .*cut at --max-new-tokens.*--keep-cut"):
        answer(config_of(records, out, max_new_tokens=1, keep_cut=False))
    assert not out.exists()
    figures = answer(config_of(records, out, max_new_tokens=1))
    assert figures["cut"] == figures["answers"] + figures["empty"]
    assert figures["cut_samples"][0] == RECORDS[0]["id"]
    assert not any(line["provenance"]["finished"] for line in written(out))


def test_samples_that_cannot_be_asked_are_rejected_by_name(tmp_path):
    data = write_data(tmp_path / "data.json", [*SAMPLES[:2], record("gone", "gone.png", "<image>\nWhat?", "It.")])
    out = tmp_path / "answers.jsonl"
    figures = answer(config_of(data, out))
    assert (figures["rejected"], list(figures["rejected_samples"])) == (1, ["gone"])
    assert [line["id"] for line in written(out)] == [r["id"] for r in SAMPLES[:2]]
    with pytest.raises(DataError, match="more than --max-rejected 0"):
        answer(config_of(data, tmp_path / "none.jsonl", max_rejected=0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"n": 2}, "give a temperature"), ({"out": "answers.txt"}, r"ends in \.jsonl or \.json")],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        config_of("data.json", **{"out": "answers.jsonl", **changes})


def test_the_last_stretch_of_supervised_labels_is_found():
    i = IGNORE
    for labels, expected in (([i, 1, 2, i, 3, 4, i], [3, 4]), ([i, i], []), ([5, 6], [5, 6]), ([i, 7], [7])):
        assert last_supervised(np.array(labels)) == expected


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.text(), st.integers(0, 9), st.integers(1, 50))
def test_the_numbers_of_an_answer_begin_in_the_same_way_however_many_there_are(seed, key, number, count):
    numbers = uniform_numbers(seed, key, number, count)
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert np.array_equal(numbers[: count // 2], uniform_numbers(seed, key, number, count // 2))
    assert not np.array_equal(numbers, uniform_numbers(seed, key, number + 1, count))


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits_V = torch.tensor([0.0, 1.0, 2.0, -torch.inf, 3.0])
    uniforms_BN = ((np.arange(10_000) + 0.5) / 10_000)[:, None]
    for temperature, top_p, expected_V in (
        (1.0, 1.0, logits_V.softmax(0)),
        (2.0, 1.0, (logits_V / 2).softmax(0)),
        (1.0, 0.7, torch.tensor([0, 0, *torch.tensor([2.0, 3.0]).softmax(0).tolist()])[[0, 1, 2, 0, 3]]),
    ):
        drawn_BV = DrawnTokens(uniforms_BN, temperature, top_p)(torch.zeros(10_000, 1), logits_V.expand(10_000, 5))
        shares_V = (drawn_BV == 0).float().mean(dim=0)
        torch.testing.assert_close(shares_V, expected_V, atol=2e-4, rtol=0)


@pytest.mark.parametrize("shape", ["webdataset", "parquet"])
def test_images_that_the_data_holds_are_written_beside_the_answers(tmp_path, shape):
    records = [*SAMPLES[:3], SAMPLES[4]]
    if shape == "parquet":
        pytest.importorskip("pyarrow")
        data = str(write_parquet(tmp_path / "data.parquet", records, IMAGES, paths=False))
    else:
        data = write_webdataset(tmp_path / "shards", records, IMAGES, paths=False)
    out = tmp_path / "answers.jsonl"
    figures = answer(config_of(data, out, images=None))
    assert figures["images"] == str(tmp_path / "answers.jsonl.images")
    plain = tmp_path / "plain.jsonl"
    answer(config_of(write_data(tmp_path / "plain.json", records), plain))
    said = [[line["conversations"] for line in written(path)] for path in (out, plain)]
    assert said[0] == said[1]
    for line, record_ in zip(written(out), records, strict=True):
        if "image" in record_:
            content = (Path(figures["images"]) / line["image"]).read_bytes()
            assert content == (IMAGES / record_["image"]).read_bytes()
            assert Path(line["image"]).stem == hashlib.sha256(content).hexdigest()
    again = answer(config_of(out, tmp_path / "again.jsonl", images=figures["images"]))
    assert (again["answers"], again["rejected"]) == (len(records), 0)


def test_data_with_images_in_several_folders_is_written_for_the_folder_above_them(tmp_path):
    for name in ("a", "b"):
        shutil.copytree(IMAGES, tmp_path / name)
    data = [str(write_data(tmp_path / f"{name}.json", [{**SAMPLES[0], "id": name}])) for name in ("a", "b")]
    out = tmp_path / "answers.jsonl"
    folders = [str(tmp_path / name) for name in ("a", "b")]
    figures = answer(replace(config_of(data[0], out), data=data, images=folders))
    assert figures["images"] == str(tmp_path)
    assert [line["image"] for line in written(out)] == [f"{name}/{SAMPLES[0]['image']}" for name in ("a", "b")]
