"""MME keeps the promises of a benchmark, and the official tool's rules; what that tool fails on is refused by name."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from benchmark_conformance import FIXTURES, BenchmarkConformance, lines_of, score_of, write_lines

from alignkd.errors import DataError
from alignkd.pipeline.evaluate.benchmarks.mme import read_lmms_eval, read_official
from alignkd.pipeline.evaluate.benchmarks.registry import open_benchmark

RELEASE = "MME_Benchmark_release_version"
ABSENT = "landmark/images/5d39d0a89a2ef80f.jpg"
ANSWERS = FIXTURES / "mme" / "predictions.jsonl"


def edit_first(lines, change):
    place = next(place for place, line in enumerate(lines) if line["question_id"] == ABSENT)
    return [*lines[:place], *([] if change is None else [lines[place] | change(lines[place])]), *lines[place + 1 :]]


def moved(lines):
    """The second answer about the first picture of color stands after the other two of its category."""
    places = [place for place, line in enumerate(lines) if line["question_id"].startswith("color/")]
    lines = list(lines)
    lines[places[1]], lines[places[2]] = lines[places[2]], lines[places[1]]
    return lines


class TestMme(BenchmarkConformance):
    name = "mme"
    official = (RELEASE,)
    question_files = ("llava_mme.jsonl",)
    reference = "official"
    absent_pictures = (f"{RELEASE}/{ABSENT}",)
    error_cases = {  # noqa: RUF012
        f"one of the two answers about {ABSENT} missing": lambda folder, lines: edit_first(lines, None),
        f"a line break inside the first answer about {ABSENT}": lambda folder, lines: edit_first(
            lines, lambda line: {"text": "Yes\nit is"}
        ),
        f"a tab inside the first answer about {ABSENT}": lambda folder, lines: edit_first(
            lines, lambda line: {"text": "Yes\tit is"}
        ),
        "a line break of another kind": lambda folder, lines: edit_first(lines, lambda line: {"text": "Yes\rit is"}),
        "no answers for the category artwork": lambda folder, lines: [
            line for line in lines if not line["question_id"].startswith("artwork/")
        ],
        "not one yes or no in the category color (every answer 'maybe')": lambda folder, lines: [
            line | {"text": "maybe"} if line["question_id"].startswith("color/") else line for line in lines
        ],
        "pairs are apart": lambda folder, lines: moved(lines),
        "a question is answered twice": lambda folder, lines: [*lines, lines[0]],
        "a question that nobody asked": lambda folder, lines: edit_first(lines, lambda line: {"prompt": "Why?"}),
        "no prompts": lambda folder, lines: [{"question_id": line["question_id"], "text": line["text"]} for line in lines],
        "ids are whole numbers": lambda folder, lines: [line | {"question_id": i} for i, line in enumerate(lines)],
    }
    counted_cases = {  # noqa: RUF012
        f"both answers about {ABSENT} missing (its image could not be read)": (
            lambda folder, lines: [line for line in lines if line["question_id"] != ABSENT],
            f"1 pictures have no answers (the first: {ABSENT})",
        )
    }

    def readings(self, expected, protocol):
        for line in expected["per_question"]:
            fields = {"prediction": line["text"], "counted": True}
            if protocol == "mobilevlm":
                fields |= {"parsed": line["read_as"], "score": float(line["correct"])}
            else:
                fields |= {"score": line["lmms_eval"]}
            yield f"{line['question_id']} {line['question'].strip()}", fields

    def identity(self, reading):
        return f"{reading.question.question_id} {reading.question.text.split(chr(10))[0].strip()}"

    def shuffle(self, folder):
        for path in (folder / RELEASE).rglob("*.txt"):
            path.write_text("\r\n".join(reversed(path.read_text().splitlines())))

    def add_fields(self, folder):
        write_lines(folder / "llava_mme.jsonl", [{**line, "unknown": 1} for line in lines_of(folder / "llava_mme.jsonl")])
        (folder / RELEASE / "eval_tool").mkdir()
        (folder / RELEASE / "read me.txt").write_text("hello")
        (folder / RELEASE / "color" / "._0001.txt").write_bytes(b"\x00\x05\x16\x07")

    def test_without_llavas_question_file_the_same_is_asked(self, folder):
        """In the order of categories and names: the official folders have none."""
        for protocol in ("mobilevlm", "lmms-eval"):
            asked = {(q.question_id, q.text): q for q in open_benchmark("mme", FIXTURES, protocol).questions}
            (folder / "llava_mme.jsonl").unlink(missing_ok=True)
            built = open_benchmark("mme", folder, protocol)
            assert {(q.question_id, q.text): q for q in built.questions} == asked
            assert built.units() == [(place, place + 1) for place in range(0, 56, 2)]
            assert score_of("mme", folder, ANSWERS, protocol).metrics == score_of("mme", FIXTURES, ANSWERS, protocol).metrics


@pytest.mark.parametrize(
    ("text", "official", "lmms_eval"),
    [
        *[(text, "yes", "yes") for text in ("Yes", "yes.", "Eyes", "YES!", "Yes no")],
        *[(text, "no", "no") for text in ("No", "not sure", "None", "know", "nope", "NO.", "unno")],
        *[(text, "other", "other") for text in ("", "I know", "maybe", "42, so no", "Sorry", "sayyes")],
        *[
            ("Y", "other", "yes"),
            ("n", "other", "no"),
            ("Y.", "other", "yes"),
            ("...yes", "other", "yes"),
            ("   yes", "other", "yes"),
        ],
    ],
)
def test_the_first_four_characters_decide(text, official, lmms_eval):
    assert (read_official(text), read_lmms_eval(text)) == (official, lmms_eval)


def test_a_pair_without_answers_changes_the_average_as_it_does_that_of_the_official_tool(tmp_path):
    (case,) = [
        case
        for case in json.loads((FIXTURES / "mme" / "expected.json").read_text())["error_cases"]
        if case["official"]["outcome"] == "no error"
    ]
    lines = [line for line in lines_of(ANSWERS) if line["question_id"] != ABSENT]
    score = score_of("mme", FIXTURES, write_lines(tmp_path / "a.jsonl", lines))
    for name in ("perception", "cognition"):
        assert score.metrics[name] == case["official"][name]
    assert score.metrics["pictures_without_answers"] == 1
    assert sum(not reading.counted for reading in score.readings) == 2


def test_lmms_eval_reads_answers_of_several_lines_in_any_order(tmp_path):
    lines = [line | {"text": line["text"] + "\n\tindeed"} for line in lines_of(ANSWERS)]
    write_lines(tmp_path / "a.jsonl", sorted(lines, key=lambda line: line["prompt"]))
    assert score_of("mme", FIXTURES, tmp_path / "a.jsonl", "lmms-eval").metrics["mme_cognition_score"] > 0


def test_lmms_eval_leaves_one_of_two_spaces_before_the_ending():
    for protocol, ending in (("mobilevlm", "scarf?\n"), ("lmms-eval", "scarf? \n")):
        questions = open_benchmark("mme", FIXTURES, protocol).questions
        (found,) = [question.text for question in questions if "red scarf" in question.text]
        assert ending in found
        assert {question.text.count("Please answer") for question in questions} == {0}


@pytest.mark.parametrize("prompt", ["{} Please answer yes or no.", "{}  Please answer yes or no.", "{}"])
def test_prompts_with_the_official_ending_find_their_question_too(tmp_path, prompt):
    ending = "\nAnswer the question using a single word or phrase."
    lines = [line | {"prompt": prompt.format(line["prompt"].removesuffix(ending))} for line in lines_of(ANSWERS)]
    assert score_of("mme", FIXTURES, write_lines(tmp_path / "a.jsonl", lines)).score == 1200


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(FIXTURES / "mme", tmp_path / "mme")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Is it red? Please answer yes or no.\tYes\n", "1 lines about one picture"),
        ("", "0 lines about one picture"),
        ("Is it red?\tYes\nIs it red? Please answer yes or no.\tNo\n", "expected two different questions"),
        ("Is it red?\tYes\nIs it blue?\tNo\nIs it green?\tNo", "3 lines about one picture"),
        ("Is it red?\tMaybe\nIs it blue?\tNo\n", "question 1: found"),
        ("Is it red? Yes\nIs it blue?\tNo\n", "question 1: found"),
        ("Is it red?\tYes\nIs it blue?\tNo\tNo\n", "question 2: found"),
    ],
)
def test_half_a_pair_and_lines_without_a_label_are_named(folder, text, words):
    path = folder / RELEASE / "color" / "000000120555.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=re.escape(f"{path}")) as refused:
        open_benchmark("mme", folder)
    assert words in str(refused.value)


def test_missing_categories_are_all_named(folder):
    for category in ("OCR", "artwork"):
        shutil.rmtree(folder / RELEASE / category)
    with pytest.raises(DataError, match=rf"{RELEASE}/artwork, {RELEASE}/OCR of MME.*licence: academic research only"):
        open_benchmark("mme", folder)


def test_a_question_file_that_lacks_half_a_pair_or_parts_one_is_refused(folder):
    path = folder / "llava_mme.jsonl"
    lines = lines_of(path)
    write_lines(path, lines[1:])
    with pytest.raises(DataError, match="lacks 1 of the 56 official questions"):
        open_benchmark("mme", folder)
    write_lines(path, moved(lines))
    with pytest.raises(DataError, match="do not follow each other"):
        open_benchmark("mme", folder)
    write_lines(path, [*lines, lines[0]])
    with pytest.raises(DataError, match="twice"):
        open_benchmark("mme", folder)


def test_ids_and_words_are_those_of_the_question_file(folder):
    path = folder / "llava_mme.jsonl"
    lines = lines_of(path)
    for line in lines:
        line["question_id"] = line["question_id"].replace("/images/", "/")
        line["text"] = line["text"].replace("?\n", "? \n")
    write_lines(path, lines)
    questions = open_benchmark("mme", folder).questions
    assert [(question.question_id, question.text) for question in questions] == [(x["question_id"], x["text"]) for x in lines]
    assert [question.images for question in questions] == [(f"{RELEASE}/{line['image']}",) for line in lines]
    assert score_of("mme", folder, ANSWERS).score == 1200
