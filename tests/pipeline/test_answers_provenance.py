"""Answers of the data and of models are told apart: in samples, in what cache-teacher takes, in what distill trains on."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import SAMPLES, TEACHER, content, metrics, stage_one_config, train, write_cache, write_data

from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.errors import CacheError, ConfigError, DataError
from alignkd.models.loading import load_vlm
from alignkd.pipeline.data.authors import authors_of, taken_by
from alignkd.pipeline.data.open_samples import open_samples
from alignkd.pipeline.data.provenance import LONGEST, AnswerChoice, Author, read_author
from alignkd.pipeline.data.sample import read_sample
from alignkd.pipeline.data.samples import SampleFile
from alignkd.pipeline.feeding import dataset
from alignkd.pipeline.training.monitoring.metrics import Metrics
from alignkd.pipeline.training.monitoring.summary import summary


def written(record, model="teacher", weights="0" * 64, number=1):
    turns = record["conversations"]
    turns = [*turns[:-1], {"from": "gpt", "value": f"{turns[-1]['value']} Written {number}."}]
    about = {"model": model, "weights": weights, "settings": {"temperature": 0.0}, "finished": True}
    return {**record, "id": f"{record['id']}#{number}", "conversations": turns, "provenance": about}


@pytest.fixture(scope="module")
def weights():
    return load_vlm(TEACHER).weights_fingerprint()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, weights):
    """Six samples of the data, three answers of the teacher, and two of another model."""
    records = [
        *SAMPLES,
        *(written(r, weights=weights) for r in SAMPLES[:3]),
        *(written(r, "other", "f" * 64) for r in SAMPLES[3:5]),
    ]
    return write_data(tmp_path_factory.mktemp("mixed") / "mixed.json", records)


def test_provenance_is_read_and_no_part_of_the_key():
    plain, about = read_sample(SAMPLES[0]), read_sample({**SAMPLES[0], "provenance": {"model": "m", "weights": "w"}})
    assert (plain.provenance, plain.author) == ("", Author())
    assert (about.provenance, about.author, about.key) == ("m", Author("m", "w"), plain.key)


@pytest.mark.parametrize(
    "value",
    ["web", [], 3, True, {}, {"model": 3}, {"model": ""}, {"model": "m", "weights": []}, {"model": "x" * (LONGEST + 1)}],
)
def test_a_provenance_of_another_form_is_the_datas_own_and_noted(value):
    sample = read_sample({**SAMPLES[0], "provenance": value})
    assert (sample.author, sample.fault) == (Author(), "")
    assert "'provenance' is not read" in sample.note


@settings(deadline=None, max_examples=40)
@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v)))
def test_no_value_of_provenance_is_an_error(value):
    found = read_author(value)
    assert found is None or isinstance(found.model, str)


def test_a_choice_survives_the_plan_and_takes_what_it_says():
    data, teacher, other = Author(), Author("t", "1"), Author("o", "2")
    for choice, taken in (
        (AnswerChoice(), [True, True, True]),
        (AnswerChoice("data"), [True, False, False]),
        (AnswerChoice("teacher", "1"), [False, True, False]),
    ):
        assert [choice.takes(author) for author in (data, teacher, other)] == taken
        assert AnswerChoice.of_meta(json.loads(json.dumps(choice.as_meta()))) == choice
    for meta in ({"answers": 3}, {"answers": "all"}, {"answers": "teacher", "weights": []}):
        assert AnswerChoice.of_meta(meta) == AnswerChoice()


def test_authors_are_those_of_the_samples_whoever_knows_them(mixed):
    samples = SampleFile(mixed)
    order = np.array([10, 0, 7, 3])
    for some in (
        samples,
        samples.select(order),
        open_samples(replace(stage_one_config(mixed, "unused"), data=(str(mixed), str(mixed)))),
    ):
        known = [some.authors.names[number] for number in some.authors.number_of]
        assert known == [some[index].author for index in range(len(some))]
    unknown = SampleFile.known(mixed, samples.keys, samples.starts, samples.lengths)
    assert unknown.authors is None
    assert np.array_equal(authors_of(unknown).number_of, samples.authors.number_of)
    assert taken_by(samples, [AnswerChoice("data")]).tolist() == [True] * 6 + [False] * 5


@pytest.mark.slow
def test_cache_teacher_takes_the_answers_that_it_is_told_to(tmp_path, mixed, weights):
    for choice, count in (("data", 6), ("teacher", 3), ("both", 11)):
        write_cache(mixed, tmp_path / choice, answers=choice)
        assert CacheReader(tmp_path / choice).plan.samples == count
    alone = write_data(tmp_path / "alone.json", json.loads(mixed.read_text())[:6])
    write_cache(alone, tmp_path / "alone")
    assert content(tmp_path / "alone") == content(tmp_path / "data")
    before = content(tmp_path / "teacher")
    write_cache(mixed, tmp_path / "teacher", answers="teacher")  # continues, and finds nothing to do
    assert content(tmp_path / "teacher") == before


def test_a_choice_that_takes_nothing_says_whose_answers_there_are(tmp_path, data, mixed):
    with pytest.raises(DataError, match=r"none of the 6 samples .* of this teacher .*written by the data: 6.*--dtype"):
        write_cache(data, tmp_path / "cache", answers="teacher")
    only = write_data(tmp_path / "only.json", json.loads(mixed.read_text())[9:])
    with pytest.raises(DataError, match=r"--answers data: none of the 2 samples .*other \(weights ffffffffffff\): 2"):
        write_cache(only, tmp_path / "cache", answers="data")
    with pytest.raises(ConfigError, match="one of data, teacher, both"):
        stage_one_config(data, tmp_path / "cache", answers="model")


@pytest.mark.slow
def test_distill_trains_on_the_answers_that_the_cache_was_written_for(tmp_path, mixed, caplog):
    write_cache(mixed, tmp_path / "cache", answers="data")
    with caplog.at_level("INFO", logger=dataset.__name__):
        figures = train(mixed, tmp_path / "cache", tmp_path / "run", epochs=1.0)
    assert figures["samples"] == 6
    assert "5 samples are left out" in caplog.text


@pytest.mark.slow
def test_a_sample_that_the_choice_takes_and_the_cache_lacks_is_still_an_error(tmp_path, data, mixed):
    write_cache(data, tmp_path / "cache", answers="data")
    more = [*json.loads(mixed.read_text()), {**SAMPLES[0], "id": "more"}]
    with pytest.raises(CacheError, match="'more' has no row in the cache"):
        train(write_data(tmp_path / "more.json", more), tmp_path / "cache", tmp_path / "run", epochs=1.0)
    write_cache(data, tmp_path / "both")
    with pytest.raises(CacheError, match="has no row in the cache"):
        train(mixed, tmp_path / "both", tmp_path / "run", epochs=1.0)


@pytest.mark.slow
def test_metrics_tell_the_datas_own_answers_and_written_ones_apart(tmp_path, data, mixed):
    whole = {"recipe": "sft", "epochs": 1.0, "batch_size": 11}
    alone = train(data, None, tmp_path / "alone", **whole)
    figures = train(mixed, None, tmp_path / "both", **whole)
    (of_data,), (line,) = metrics(tmp_path / "alone"), metrics(tmp_path / "both")
    assert not {"samples_written", "data/supervised"} & (of_data.keys() | alone.keys())
    assert (line["samples_data"], line["samples_written"]) == (figures["samples_data"], figures["samples_written"]) == (6, 5)
    assert line["data/supervised"] == pytest.approx(of_data["supervised"], rel=1e-4)
    answers = of_data["answers"], line["answers"] - of_data["answers"]
    means = line["data/supervised"], line["written/supervised"]
    assert sum(n * mean for n, mean in zip(answers, means, strict=True)) / sum(answers) == pytest.approx(line["supervised"])
    assert "6 samples with answers of the data, 5 with written ones" in summary(figures)


@pytest.mark.parametrize("at", range(4))
def test_counts_by_author_go_on_after_a_resume_as_without_it(tmp_path, at):
    batches = [([True, False], [0, 0, 1]), ([False, False], [0, 1, 1]), ([True], [0]), ([True, False], [0, 1, 1])]

    def fresh():
        return Metrics(tmp_path / "metrics.jsonl", {"supervised": 1.0}, writes=True, answer_terms=["supervised"])

    def step(found, number):
        written, samples_A = batches[number][0], torch.tensor(batches[number][1])
        found.by_author.add({"supervised": torch.arange(len(samples_A)) + float(number)}, written, samples_A)
        return by_author(found.line({}, step=number, epoch=0.0)) if number in (1, 3) else None

    whole, cut = fresh(), fresh()
    for number in range(len(batches)):
        expected = step(whole, number)
        if number == at:
            state = json.loads(json.dumps(cut.state_dict()))
            cut = fresh()
            cut.resume(state, number - 1)
        assert step(cut, number) == expected
    assert expected == {"samples_data": 4, "samples_written": 3, "data/supervised": 4.5, "written/supervised": 2.5}


def by_author(line):
    return {name: value for name, value in line.items() if name.startswith(("samples_d", "samples_w", "data/", "written/"))}


def test_of_data_without_written_answers_a_line_says_nothing(tmp_path):
    found = Metrics(tmp_path / "metrics.jsonl", {"supervised": 1.0}, writes=True, answer_terms=["supervised"])
    found.by_author.add({"supervised": torch.ones(2)}, [False], torch.tensor([0, 0]))
    assert by_author(found.line({}, step=1, epoch=0.0)) == {}
