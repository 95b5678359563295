"""MMBench keeps the promises of a benchmark, and OpenCompass's rules without a judge."""

from __future__ import annotations

import csv
import io
import json
import random
import re
import tracemalloc

import pytest
from benchmark_conformance import FIXTURES, BenchmarkConformance, lines_of, score_of, write_lines
from PIL import Image

from alignkd.errors import DataError
from alignkd.pipeline.evaluate.benchmarks.registry import open_benchmark
from alignkd.pipeline.evaluate.benchmarks.shared.option_letters import letter_or_option, likeliest_letter

OFFICIAL = "mmbench_dev_en_20231003.tsv"
ONCE = "MMBench_DEV_EN.tsv"
ANSWERS = FIXTURES / "mmbench" / "predictions.jsonl"
EXPECTED = json.loads((FIXTURES / "mmbench" / "expected.json").read_text())


def table(path):
    return list(csv.reader(io.StringIO(path.read_text(), newline=""), delimiter="\t"))


def write_table(path, rows):
    with path.open("w", newline="", encoding="utf-8", errors="surrogatepass") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows(rows)
    return path


class TestMmBench(BenchmarkConformance):
    name = "mmbench"
    official = (OFFICIAL,)
    reference = "opencompass"
    not_prompted_alike = frozenset(
        place
        for place, row in enumerate(table(FIXTURES / "mmbench" / OFFICIAL)[1:])
        if int(row[0]) in EXPECTED["rows_with_pandas_na_artefact"]
    )
    error_cases = {  # noqa: RUF012
        "a pass without an answer": lambda folder, lines: lines[:-1],
        "first passes alone": lambda folder, lines: [line for line in lines if line["question_id"] < 1_000_000],
        "a row answered twice, differently": lambda folder, lines: [*lines, {**lines[0], "text": "C"}],
        "a prompt is another question's": lambda folder, lines: [{**lines[0], "prompt": lines[1]["prompt"]}, *lines[1:]],
        "ids are texts": lambda folder, lines: [{**line, "question_id": str(line["question_id"])} for line in lines],
    }

    def readings(self, expected, protocol):
        for line in expected["per_question"]:
            fields = {"prediction": line["text"], "counted": True}
            if protocol == "mobilevlm":
                fields |= {"parsed": line["inferred"] or "", "score": float(line["correct"])}
            yield str(line["question_id"]), fields

    def shuffle(self, folder):
        header, *rows = table(folder / OFFICIAL)
        random.Random(0).shuffle(rows)
        write_table(folder / OFFICIAL, [header, *rows])

    def test_unknown_fields_of_official_rows_change_nothing(self, folder):
        """A column that nobody knows is refused: another set of options would change what is asked."""
        write_table(
            folder / OFFICIAL, [[*row, "E" if place == 0 else "x"] for place, row in enumerate(table(folder / OFFICIAL))]
        )
        with pytest.raises(DataError, match=r"unknown columns, 'E'; found index, .*; expected index, "):
            open_benchmark("mmbench", folder)

    def test_recorded_prompts_are_those_of_the_reference_answer_file(self):
        recorded = {line["question_id"]: line for line in lines_of(self.answers)}
        artefacts = EXPECTED["rows_with_pandas_na_artefact"]
        questions = open_benchmark("mmbench", FIXTURES).questions
        asked = [question for question in questions if question.question_id not in artefacts]
        assert len(asked) == 46
        for question in asked:
            line = recorded[question.question_id]
            assert question.prompt == line["prompt"]
            assert dict(question.extra) == {name: line[name] for name in ("round_id", "options", "option_char")}
            assert question.text == f"{line['prompt']}\nAnswer with the option's letter from the given choices directly."


def test_the_image_treatment_is_what_the_reference_loader_hands_to_the_processor():
    benchmark = open_benchmark("mmbench", FIXTURES)
    given = {line["question_id"]: line["image_given_to_processor"] for line in lines_of(FIXTURES / "mmbench" / "prompts.jsonl")}
    assert benchmark.image_treatment == "pad-own-mode"
    for question in benchmark.questions:
        with Image.open(io.BytesIO(benchmark.read_image(*question.images))) as picture:
            assert {"mode": picture.mode, "size": [max(picture.size)] * 2} == given[question.question_id]


def test_groups_are_right_where_all_their_passes_are():
    score = score_of("mmbench", FIXTURES, ANSWERS)
    benchmark = open_benchmark("mmbench", FIXTURES)
    for unit, group in zip(benchmark.units(), EXPECTED["groups"], strict=True):
        assert (len(unit), benchmark.questions[unit[0]].question_id) == (group["passes"], group["index"])
        assert all(score.readings[place].score for place in unit) == bool(group["hit"])


def test_first_passes_and_all_rows_stand_beside_the_circular_figure():
    score = score_of("mmbench", FIXTURES, ANSWERS)
    other = EXPECTED["references"]["opencompass_rules_other_aggregations"]
    for name in ("first_pass_only", "all_rows"):
        assert score.metrics[name] == pytest.approx(other[name], abs=1e-9)
    assert score.metrics["undecided"] == sum(line["inferred"] is None for line in EXPECTED["per_question"]) == 3
    assert "3 of 54 answers name no option" in " ".join(score.notes)
    assert "presumed" in " ".join(score.notes)


def test_lmms_eval_asks_in_its_own_words():
    questions = {question.question_id: question for question in open_benchmark("mmbench", FIXTURES, "lmms-eval").questions}
    for line in EXPECTED["lmms_eval_prompts"]:
        assert questions[line["question_id"]].text == line["prompt"]


@pytest.fixture
def once(tmp_path):
    (tmp_path / ONCE).write_bytes((FIXTURES / "mmbench" / "picture_once" / ONCE).read_bytes())
    return tmp_path


def test_a_file_with_each_picture_once_is_the_same_benchmark(once):
    every, single = open_benchmark("mmbench", FIXTURES), open_benchmark("mmbench", once)
    assert single.questions == every.questions
    assert score_of("mmbench", once, ANSWERS).metrics == score_of("mmbench", FIXTURES, ANSWERS).metrics
    assert single.settings["official_file"] == ONCE
    for question in every.questions:
        (reference,) = question.images
        assert every.read_image(reference) == single.read_image(reference)


def test_equal_pictures_have_one_reference_so_that_each_is_seen_once():
    benchmark = open_benchmark("mmbench", FIXTURES)
    named = {question.images for question in benchmark.questions}
    assert len(named) == len({benchmark.read_image(*images) for images in named})
    for unit in benchmark.units():
        assert len({benchmark.questions[place].images for place in unit}) == 1


def test_pictures_stay_in_the_file(tmp_path):
    header, *rows = table(FIXTURES / "mmbench" / OFFICIAL)
    place = header.index("image")
    for number, row in enumerate(rows):
        row[place] = f"{number:08d}" * 25_000
    path = write_table(tmp_path / OFFICIAL, [header, *rows])
    assert path.stat().st_size > 10 * 2**20
    tracemalloc.start()
    try:
        benchmark = open_benchmark("mmbench", tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 3 * 2**20
    finally:
        tracemalloc.stop()
    assert len({question.images for question in benchmark.questions}) == len(rows)


def test_texts_that_look_like_nothing_are_texts(once):
    header, *rows = table(once / ONCE)
    for letter, text in zip("ABC", ("None", "N/A", "nan"), strict=True):
        rows[0][header.index(letter)] = text
    write_table(once / ONCE, [header, *rows])
    (question,) = [question for question in open_benchmark("mmbench", once).questions if question.question_id == 177]
    assert question.prompt == "What is the mood?\nA. None\nB. N/A\nC. nan"
    assert any("9 rows have an option such as N/A or none" in note for note in open_benchmark("mmbench", once).notes)


def edited(once, column, value, row=1):
    rows = table(once / ONCE)
    rows[row][rows[0].index(column)] = value
    write_table(once / ONCE, rows)


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("answer", "", "test files hold no answers"),
        ("answer", "E", "'answer' is 'E', expected one of A, B, C"),
        ("answer", "D", "'answer' is 'D'"),
        ("split", "test", "'split' is 'test', expected dev"),
        ("index", "one", "'index' is 'one'"),
        ("index", "441", "index 441 stands twice"),
        ("index", "178", "index 1000177 is a later pass of question 177"),
    ],
)
def test_a_row_that_cannot_be_scored_is_named(once, column, value, words):
    edited(once, column, value)
    with pytest.raises(DataError, match=re.escape(words)):
        open_benchmark("mmbench", once)


@pytest.mark.parametrize(("column", "new"), [("answer", "label"), ("l2-category", "area"), ("A", "option")])
def test_a_lacking_column_is_named(once, column, new):
    edited(once, column, new, row=0)
    with pytest.raises(DataError, match=f"lacks the columns {column}; found .*{new}"):
        open_benchmark("mmbench", once)


@pytest.mark.parametrize(
    "name", ["MMBench_DEV_EN_V11.tsv", "mmbench_test_en_20231003.tsv", "MMBench_TEST_EN.tsv", "mmbench_dev_cn_20231003.tsv"]
)
def test_other_files_of_mmbench_are_refused_by_name(once, name):
    (once / ONCE).rename(once / name)
    with pytest.raises(DataError, match=rf"lacks {OFFICIAL}.*found {name}: _V11 .* test files hold no answers"):
        open_benchmark("mmbench", once)


@pytest.mark.parametrize("image", ["", "999", "177", "/etc/passwd"])
def test_pictures_that_no_row_holds_are_missing_and_scores_do_not_need_them(once, image):
    edited(once, "image", image)
    benchmark = open_benchmark("mmbench", once)
    assert benchmark.missing_images() == [image]
    with pytest.raises(DataError, match="holds a picture"):
        benchmark.read_image(image)
    assert score_of("mmbench", once, ANSWERS).score == pytest.approx(EXPECTED["paper_figure"]["value"], abs=1e-9)


def test_a_picture_that_is_not_base64_is_named(once):
    edited(once, "image", "@" * 100)
    with pytest.raises(DataError, match="the picture of row 177 is not base64"):
        open_benchmark("mmbench", once).read_image("177")


def test_a_question_with_fewer_passes_than_options_is_counted(once):
    rows = table(once / ONCE)
    write_table(once / ONCE, [row for row in rows if row[0] != "2000177"])
    assert any("1 questions have fewer passes" in note for note in open_benchmark("mmbench", once).notes)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        *[
            (text, "B")
            for text in ("B", "B.", "B,", "B:", "B)", "B).", "(B)", "(B).", ":B", ":B,", ":B.", ":B)", ":B).", " B\n")
        ],
        *[("It is B for sure, yes", "B"), ("A wall", "A"), ("A thing on a wall", ""), ("A man near B.", "B"), ("A or B", "")],
        *[("E", "E"), ("E: none", "E"), ("a", ""), ("F", ""), ("A. or B.", ""), ("A. or B,", "A"), ("", ""), ("Big TREE", "C")],
        *[("tree or pond", ""), ("**B**", ""), ("Failed to obtain answer via API B", ""), ("(B", "")],
    ],
)
def test_letters_are_read_by_opencompass_rules(answer, letter):
    assert letter_or_option(answer, {"C": "Tree", "D": "pond"}) == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        *[("The answer is B", "B"), ("**B**", "B"), ("So A is out. The answer is C because B", "B"), ("", ""), (" ?! ", "")],
        *[("(A) or (B) maybe", "B"), ("not D, but (A) then", "A"), ("xAx", "A"), ("none", ""), ("BC", "C"), ("A. x B. y", "A")],
    ],
)
def test_lmms_eval_takes_the_surest_form_then_the_last(answer, letter):
    assert likeliest_letter(answer, "ABCD") == letter


def test_answers_given_twice_alike_count_once(tmp_path):
    lines = lines_of(ANSWERS)
    score = score_of("mmbench", FIXTURES, write_lines(tmp_path / "a.jsonl", [*lines, lines[0]]))
    assert score.metrics == score_of("mmbench", FIXTURES, ANSWERS).metrics
