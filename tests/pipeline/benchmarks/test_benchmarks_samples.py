"""Some questions of a benchmark are worth what official files that hold no others give."""

from __future__ import annotations

import json
import math
import shutil

import pytest
from benchmark_conformance import FIXTURES, close, lines_of, write_lines
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_benchmarks_mmbench import table, write_table

from alignkd.errors import DataError
from alignkd.pipeline.evaluate.benchmarks.contract import PROTOCOLS, Benchmark
from alignkd.pipeline.evaluate.benchmarks.files import read_answers
from alignkd.pipeline.evaluate.benchmarks.registry import open_benchmark

NAMES = sorted(folder.name for folder in FIXTURES.iterdir() if folder.is_dir())
GOLDEN = {}
for _name in NAMES:
    for _protocol in PROTOCOLS:
        _benchmark = open_benchmark(_name, FIXTURES, _protocol)
        _matched = _benchmark.match(read_answers(FIXTURES / _name / "predictions.jsonl"))
        GOLDEN[_name, _protocol] = _benchmark, _matched


def drawn(data, benchmark: Benchmark) -> list[int]:
    units = data.draw(st.lists(st.sampled_from(benchmark.units()), min_size=1, unique=True))
    return sorted(index for unit in units for index in unit)


def score_or_none(benchmark, answers):
    try:
        return benchmark.score(answers)
    except DataError:
        return None


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_answers_of_a_sample_are_read_as_among_all(name, protocol, data):
    benchmark, matched = GOLDEN[name, protocol]
    kept = drawn(data, benchmark)
    score = score_or_none(benchmark.only(kept), [matched[index] for index in kept])
    everything = benchmark.score(matched).readings
    assume(score is not None)
    assert score.readings == tuple(everything[index] for index in kept)
    assert math.isfinite(score.score)


def keep_files(name, folder, questions):
    """Leave the official files with some questions alone, and without LLaVA's question file, unless it gives the order."""
    ids = {str(question.question_id) for question in questions}
    asked = {(question.question_id, question.text) for question in questions}
    if name == "gqa":
        (folder / "llava_gqa_testdev_balanced.jsonl").unlink()
        path = folder / "testdev_balanced_questions.json"
        path.write_text(json.dumps({key: row for key, row in json.loads(path.read_text()).items() if key in ids}))
    elif name == "pope":
        path = folder / "llava_pope_test.jsonl"
        lines = lines_of(path)
        write_lines(path, [line for line in lines if str(line["question_id"]) in ids])
        for category in ("adversarial", "random", "popular"):
            of_category = [line for line in lines if line["category"] == category]
            path = folder / "coco" / f"coco_pope_{category}.json"
            rows = zip(of_category, lines_of(path), strict=True)
            write_lines(path, [row for line, row in rows if str(line["question_id"]) in ids])
    elif name == "mme":
        path = folder / "llava_mme.jsonl"
        lines = lines_of(path)
        write_lines(path, [line for line in lines if (line["question_id"], line["text"]) in asked])
        stems = {name.rsplit("/", 1)[1].split(".")[0] + name.split("/")[0] for name in ids}
        for text in (folder / "MME_Benchmark_release_version").rglob("*.txt"):
            category = text.parent.parent.name if text.parent.name == "questions_answers_YN" else text.parent.name
            if text.stem + category not in stems:
                text.unlink()
    else:
        path = folder / "mmbench_dev_en_20231003.tsv"
        header, *rows = table(path)
        write_table(path, [header, *(row for row in rows if row[0] in ids)])


@settings(max_examples=15)
@pytest.mark.parametrize("name", ["gqa", "mmbench", "mme", "pope"])
@given(data=st.data())
def test_a_sample_has_the_score_of_official_files_that_hold_no_others(tmp_path_factory, name, data):
    benchmark, matched = GOLDEN[name, "mobilevlm"]
    kept = drawn(data, benchmark)
    if name in ("mme", "pope"):  # every category must be there
        first = {benchmark.questions[unit[0]].category: unit for unit in reversed(benchmark.units())}
        kept = sorted({*kept, *(index for unit in first.values() for index in unit)})
    some = benchmark.only(kept)
    folder = tmp_path_factory.mktemp("some") / name
    shutil.copytree(FIXTURES / name, folder, ignore=shutil.ignore_patterns("*.jpg", "*.png"))
    keep_files(name, folder, some.questions)
    whole = open_benchmark(name, folder)
    assert sorted(map(str, whole.questions)) == sorted(map(str, some.questions))
    given_answers = {(q.question_id, q.text): matched[index] for index, q in zip(kept, some.questions, strict=True)}
    expected = score_or_none(whole, [given_answers[question.question_id, question.text] for question in whole.questions])
    shutil.rmtree(folder)
    assume(expected is not None)
    found = some.score([matched[index] for index in kept])
    assert found.score == pytest.approx(expected.score, abs=1e-9)
    figures = {metric: value for metric, value in expected.metrics.items() if value is not None}
    assert close(found.metrics, figures)
