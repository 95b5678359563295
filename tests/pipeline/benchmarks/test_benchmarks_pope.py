"""POPE keeps the promises of a benchmark, and LLaVA's rules; answers and labels of different versions are never paired."""

from __future__ import annotations

import json
import random
import re

import pytest
from benchmark_conformance import FIXTURES, BenchmarkConformance, lines_of, score_of, write_lines

from alignkd.errors import DataError
from alignkd.pipeline.evaluate.benchmarks.contract import Answer
from alignkd.pipeline.evaluate.benchmarks.pope import read_yes_no
from alignkd.pipeline.evaluate.benchmarks.registry import open_benchmark

CATEGORIES = ("adversarial", "random", "popular")
ANSWERS = FIXTURES / "pope" / "predictions.jsonl"
RANDOM = "coco/coco_pope_random.json"


def reversed_within(lines, first, last):
    inside = [line for line in lines if first <= line["question_id"] <= last]
    return [inside.pop() if first <= line["question_id"] <= last else line for line in lines]


class TestPope(BenchmarkConformance):
    name = "pope"
    official = tuple(f"coco/coco_pope_{category}.json" for category in CATEGORIES)
    question_files = ("llava_pope_test.jsonl",)
    error_cases = {  # noqa: RUF012
        "a model that never says yes": lambda folder, lines: [{**line, "text": "No"} for line in lines],
        "no yes of one category is right": lambda folder, lines: [
            {**line, "text": "No"} if line["question_id"] > 20_000_000 else line for line in lines
        ],
        "lines are reversed": lambda folder, lines: lines[::-1],
        "two lines are swapped": lambda folder, lines: [lines[1], lines[0], *lines[2:]],
        "a line in the middle is missing": lambda folder, lines: lines[:3] + lines[4:],
        "lines at the end are missing": lambda folder, lines: lines[:-2],
        "a question is answered twice": lambda folder, lines: [*lines[:5], lines[4], *lines[5:]],
        "a line about another question": lambda folder, lines: [*lines, {**lines[0], "question_id": 40_000_000}],
        "a prompt is another question's": lambda folder, lines: [{**lines[0], "prompt": lines[1]["prompt"]}, *lines[1:]],
        "ids are texts": lambda folder, lines: [{**line, "question_id": str(line["question_id"])} for line in lines],
    }

    def readings(self, expected, protocol):
        for line in expected["per_question"]:
            read = line["read_as"] if protocol == "mobilevlm" else line["lmms_eval_read_as"]
            right = read == line["label"]
            assert protocol == "lmms-eval" or right == line["correct"]
            fields = {"prediction": line["text"], "parsed": read, "score": float(right), "counted": True}
            yield str(line["question_id"]), fields

    def is_json_lines(self, name):
        return name.startswith("coco_pope_")

    def shuffle(self, folder):
        """Lines of the official files must stay where they are: see below. Categories may change places in the answer file."""

    def add_fields(self, folder):
        for name in (*self.official, *self.question_files):
            write_lines(folder / name, [{**line, "unknown": [1]} for line in lines_of(folder / name)])

    @pytest.mark.parametrize("name", official)
    def test_official_rows_in_another_order_are_refused(self, folder, name):
        rows = lines_of(folder / name)
        random.Random(1).shuffle(rows)
        write_lines(folder / name, rows)
        with pytest.raises(DataError, match="different versions"):
            open_benchmark("pope", folder)
        (folder / "llava_pope_test.jsonl").unlink()
        with pytest.raises(DataError, match="pairs labels by order"):
            score_of("pope", folder, ANSWERS)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        *[
            (text, "yes")
            for text in ("", "NO", "no!", "(no)", "nO", "none", "isn't", "No\nthere", "no;", ". No", "Yes. No.", "no-one")
        ],
        *[
            (text, "no")
            for text in ("No", "no", "not", "No.", "Yes, not far", "no, no", ",no", "n,o", "a no", "It's not there")
        ],
    ],
)
def test_no_is_one_of_three_words_in_the_first_sentence(text, read):
    assert read_yes_no(text) == read


def test_answers_of_categories_may_be_mixed_but_not_those_within_one(tmp_path):
    lines = lines_of(ANSWERS)
    before = score_of("pope", FIXTURES, ANSWERS)
    mixed = [line for place in range(22) for line in lines if line["question_id"] % 10_000_000 == place + 1]
    mixed_score = score_of("pope", FIXTURES, write_lines(tmp_path / "mixed.jsonl", mixed))
    assert (mixed_score.metrics, mixed_score.readings) == (before.metrics, before.readings)
    wrong = write_lines(tmp_path / "wrong.jsonl", reversed_within(lines, 10_000_001, 10_000_022))
    with pytest.raises(DataError, match=r"\(random question 10000002\).*put the random answers in the order"):
        score_of("pope", FIXTURES, wrong)


def test_lmms_eval_pairs_by_id_so_order_does_not_matter_there(tmp_path):
    lines = lines_of(ANSWERS)
    random.Random(0).shuffle(lines)
    shuffled = score_of("pope", FIXTURES, write_lines(tmp_path / "a.jsonl", lines), "lmms-eval")
    assert shuffled.metrics == score_of("pope", FIXTURES, ANSWERS, "lmms-eval").metrics


def test_lmms_eval_counts_a_model_that_never_says_yes_as_0(tmp_path):
    lines = [{**line, "text": "No"} for line in lines_of(ANSWERS)]
    score = score_of("pope", FIXTURES, write_lines(tmp_path / "a.jsonl", lines), "lmms-eval")
    assert (score.score, score.metrics["pooled"]["precision"], score.metrics["pooled"]["recall"]) == (0, 0, 0)


@pytest.fixture
def folder(tmp_path):
    for name in (*TestPope.official, *TestPope.question_files):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((FIXTURES / "pope" / name).read_bytes())
    return tmp_path


def test_labels_of_another_version_are_refused_and_both_versions_are_named(folder):
    rows = lines_of(folder / RANDOM)
    write_lines(folder / RANDOM, [*rows, {**rows[0], "question_id": 23, "text": "Is there a fox in the image?"}])
    with pytest.raises(DataError, match=r"22 'random'.*hold.*23 'random'.*2,910.*3,000"):
        open_benchmark("pope", folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image": "COCO_val2014_000000385332.jpg"}, "its image is 'COCO_val2014_000000224761.jpg'"),
        ({"text": "Is there a cat in the image?"}, "its text is 'Is there a vase in the image?"),
        ({"label": "maybe"}, "'label' is 'maybe'"),
        ({"label": None}, "'label' is null"),
        ({"question_id": "1"}, "'question_id' is '1'"),
    ],
)
def test_a_row_that_is_not_the_questions_is_named(folder, change, words):
    rows = lines_of(folder / RANDOM)
    write_lines(folder / RANDOM, [rows[0] | change, *rows[1:]])
    with pytest.raises(DataError, match=re.escape(words)):
        open_benchmark("pope", folder)


def test_the_two_spellings_of_one_question_are_one_and_llavas_is_asked(folder):
    asked = open_benchmark("pope", folder).questions
    assert sum("imange?" in question.text for question in asked) == sum(
        "imange?" in line["text"] for line in lines_of(folder / "llava_pope_test.jsonl")
    )
    for name in TestPope.official:
        (folder / name).write_text((folder / name).read_text().replace("imange?", "image?"))
    assert open_benchmark("pope", folder).questions == asked
    (folder / "llava_pope_test.jsonl").unlink()
    assert not any("imange?" in question.text for question in open_benchmark("pope", folder).questions)


@pytest.mark.parametrize(("count", "words"), [(2910, "2,910 random"), (3000, "3,000 random"), (7, "7 random")])
def test_the_version_of_the_data_is_stated(tmp_path, count, words):
    (tmp_path / "coco").mkdir()
    for category in CATEGORIES:
        rows = [
            {"question_id": i + 1, "image": "a.jpg", "text": f"Is there a {i} in the image?", "label": "no" if i % 2 else "yes"}
            for i in range(count if category == "random" else 3000)
        ]
        write_lines(tmp_path / "coco" / f"coco_pope_{category}.json", rows)
    benchmark = open_benchmark("pope", tmp_path)
    assert words in benchmark.settings["data_version"]
    assert len(benchmark.questions) == 6000 + count


def test_a_category_that_is_not_among_some_questions_is_named():
    benchmark = open_benchmark("pope", FIXTURES)
    some = benchmark.only(range(40))
    answers = lines_of(ANSWERS)[:40]
    assert {question.category for question in some.questions} == {"adversarial", "random"}

    score = some.score([Answer(a["question_id"], a["prompt"], a["text"], i) for i, a in enumerate(answers, start=1)])
    scores = json.loads((FIXTURES / "pope" / "expected.json").read_text())["references"]["llava"]["scores"]["categories"]
    assert score.score == pytest.approx(50 * (scores["adversarial"]["f1"] + scores["random"]["f1"]), abs=1e-9)
    assert "no question of the category popular" in " ".join(score.notes)


def test_a_sample_without_a_right_yes_counts_0_and_says_so():
    benchmark = open_benchmark("pope", FIXTURES)
    some = benchmark.only(range(6))
    score = some.score([Answer(question.question_id, question.prompt, "No", 1) for question in some.questions])
    assert score.score == 0
    assert "F1 is 0 / 0, counted as 0" in " ".join(score.notes)


def test_prompts_of_any_template_or_none_are_fine_if_they_hold_the_question(tmp_path):
    lines = lines_of(ANSWERS)
    before = score_of("pope", FIXTURES, ANSWERS).readings
    for write in (lambda text: f"USER: <image>  {text.replace('imange', 'image')} ASSISTANT:", lambda text: ""):
        answers = write_lines(tmp_path / "a.jsonl", [line | {"prompt": write(line["prompt"])} for line in lines])
        assert score_of("pope", FIXTURES, answers).readings == before
