"""TextVQA keeps the promises of a benchmark, and m4c's rules."""

from __future__ import annotations

import json
import random
import re

import pytest
from benchmark_conformance import FIXTURES, BenchmarkConformance, lines_of, score_of, write_lines
from hypothesis import given
from hypothesis import strategies as st

from alignkd.errors import DataError
from alignkd.pipeline.evaluate.benchmarks.registry import open_benchmark
from alignkd.pipeline.evaluate.benchmarks.shared.contractions import CONTRACTIONS
from alignkd.pipeline.evaluate.benchmarks.shared.vqa_text import agreement, m4c_text, vqa_text

OFFICIAL, OCR = "TextVQA_0.5.1_val.json", "TextVQA_Rosetta_OCR_v0.2_val.json"
QUESTIONS = ("llava_textvqa_val_v051_ocr.jsonl", "llava_textvqa_val_v051_no_ocr.jsonl")
EXPECTED = json.loads((FIXTURES / "textvqa" / "expected.json").read_text())


def edit(path, change):
    value = json.loads(path.read_text())
    change(value["data"])
    path.write_text(json.dumps(value))


def nine_answers(folder, lines):
    edit(folder / OFFICIAL, lambda rows: rows[0]["answers"].pop())
    return lines


def first_prompt(prompt):
    def make(folder, lines):
        return [{**lines[0], "prompt": prompt}, *lines[1:]]

    return make


class TestTextVqa(BenchmarkConformance):
    name = "textvqa"
    official = (OFFICIAL, OCR)
    question_files = QUESTIONS
    not_metrics = frozenset({"printed", "accuracy_no_ocr_file"})
    error_cases = {  # noqa: RUF012
        "a prompt of four lines": first_prompt("what is it?\nReference OCR token: A\nAnswer\nin words."),
        "a prompt of one line": first_prompt("what is the brand of this kettle?"),
        "a prompt of three lines without OCR tokens": first_prompt("what is the brand of this kettle?\nb\nc"),
        "nine answers instead of ten": nine_answers,
        "an answer about another picture": lambda folder, lines: [{**lines[0], "question_id": "ffff"}, *lines[1:]],
        "an answer to another question": first_prompt("What is it?\nAnswer the question using a single word or phrase."),
        "an id written as an integer": lambda folder, lines: [{**lines[0], "question_id": 12}, *lines[1:]],
        "a question is answered twice": lambda folder, lines: [*lines, lines[3]],
    }
    counted_cases = {"half of the answers": (lambda folder, lines: lines[::2], "16 of 33 questions have no answer")}  # noqa: RUF012

    def readings(self, expected, protocol):
        for line in expected["per_question"]:
            score = line["score"] if protocol == "mobilevlm" else line["lmms_eval"]
            fields = {"prediction": line["text"], "parsed": line["normalised"], "score": score, "counted": True}
            yield (line["image_id"], line["question"].lower()), fields

    def identity(self, reading):
        return str(reading.question.question_id), reading.question.text.split("\n")[0].lower()

    def shuffle(self, folder):
        for name in self.official:
            edit(folder / name, random.Random(0).shuffle)

    def add_fields(self, folder):
        for name in self.official:
            edit(folder / name, lambda rows: [row.update(unknown={"a": 1}) for row in rows])

    def test_each_official_file_is_needed(self, folder):
        for name in (*self.official, *self.question_files):
            (folder / name).rename(folder.parent / name)
        for name in self.official:
            (folder / name).write_bytes((folder.parent / name).read_bytes())
        assert len(open_benchmark("textvqa", folder).questions) == 33
        for name in self.official:
            (folder / name).unlink()
            with pytest.raises(DataError, match=re.escape(name)):
                open_benchmark("textvqa", folder)
            (folder / name).write_bytes((folder.parent / name).read_bytes())

    def test_a_question_file_about_other_questions_is_refused(self, folder):
        (folder / QUESTIONS[1]).rename(folder / "other")
        whole = (folder / QUESTIONS[0]).read_bytes()
        for lines in ([], lines_of(folder / QUESTIONS[0])[1:], [*lines_of(folder / QUESTIONS[0])[:2]] * 2):
            write_lines(folder / QUESTIONS[0], lines)
            with pytest.raises(DataError, match=re.escape(QUESTIONS[0])):
                open_benchmark("textvqa", folder)
        (folder / QUESTIONS[0]).write_bytes(whole)
        self.edit_question_file(folder / QUESTIONS[0])
        with pytest.raises(DataError, match=re.escape(QUESTIONS[0])):
            open_benchmark("textvqa", folder)

    def test_damaged_official_files_are_refused_by_name(self, folder):
        for name in self.question_files:
            (folder / name).unlink()
        super().test_damaged_official_files_are_refused_by_name(folder)


@pytest.mark.parametrize("line", EXPECTED["per_question"], ids=lambda line: line["text"][:10])
def test_people_are_read_as_the_reference_reads_them(line):
    rows = json.loads((FIXTURES / "textvqa" / OFFICIAL).read_text())["data"]
    (row,) = [r for r in rows if (r["image_id"], r["question"].lower()) == (line["image_id"], line["question"].lower())]
    assert [m4c_text(answer) for answer in row["answers"]] == line["normalised_answers"]


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        *[
            ("5.", "5"),
            (".5", ".5"),
            ("1.2", "1.2"),
            ("n/a", "n"),
            ("it's", "it 's"),
            ("its", "its"),
            ("the", ""),
            ("None", "0"),
        ],
        *[("x" + "." * 33, "x."), ("x" + "." * 32, "x"), ("“a”", "“a”"), ("a-b", "b"), ("x-y", "x y"), ("x- y-z", "x yz")],
        *[("1,000", "1000"), ("Dont", "don't"), ("IVE", "ive"), ("hed've", "he'd've"), ("lets", "lets"), ("\ud800.", "\ud800")],
    ],
)
def test_the_normal_form_of_m4c(text, normal):
    assert m4c_text(text) == normal


@pytest.mark.parametrize("line", EXPECTED["per_question"], ids=lambda line: line["text"][:10])
def test_the_normal_form_of_vqa_leaves_commas_and_possessives_to_the_other_rules(line):
    text = line["text"].lower()
    if not re.search(r"\d\.$", text):  # there the tool that gave these values departs from the official code
        assert vqa_text(text) == line["vlmevalkit_normalised"]


def test_the_list_of_contractions_is_whole():
    assert len(CONTRACTIONS) == 120
    assert sum(form != form.lower() for form in CONTRACTIONS) == 4


@given(st.text(st.characters(exclude_categories=())))
def test_any_text_has_a_normal_form(text):
    assert m4c_text(text) == m4c_text(text.upper().lower()) or text.lower() != text.upper().lower()
    assert not set(m4c_text(text)) & set(';/[]"{}()=+\\_-><@`,?!\n\t')


def test_an_answer_is_worth_more_the_more_people_gave_it():
    worth = [agreement(matches, 10) for matches in range(11)]
    assert worth == pytest.approx([0, 0.3, 0.6, 0.9] + [1] * 7)


def test_prompts_without_ocr_tokens_are_matched_and_said_to_be_so(tmp_path):
    score = score_of("textvqa", FIXTURES, FIXTURES / "textvqa" / "predictions_no_ocr.jsonl")
    assert score.score == pytest.approx(EXPECTED["references"]["llava"]["scores"]["accuracy_no_ocr_file"], abs=1e-9)
    assert score.settings == {"ocr_tokens": False}
    assert "prompts hold no OCR tokens" in score.notes
    lines = (
        lines_of(FIXTURES / "textvqa" / "predictions_no_ocr.jsonl")[:3]
        + lines_of(FIXTURES / "textvqa" / "predictions.jsonl")[3:]
    )
    score = score_of("textvqa", FIXTURES, write_lines(tmp_path / "a.jsonl", lines))
    assert score.settings == {"ocr_tokens": "30 of 33"}


def test_lmms_eval_asks_without_ocr_tokens():
    benchmark = open_benchmark("textvqa", FIXTURES, "lmms-eval")
    texts = {question.text for question in benchmark.questions}
    assert {line["default"] for line in EXPECTED["lmms_eval_prompts"]} <= texts
    assert benchmark.settings == {"ocr_tokens": False}
    assert open_benchmark("textvqa", FIXTURES).settings == {"ocr_tokens": True}


def test_llavas_file_without_ocr_tokens_is_asked_where_it_is_alone(tmp_path):
    for name in (OFFICIAL, QUESTIONS[1]):
        (tmp_path / name).write_bytes((FIXTURES / "textvqa" / name).read_bytes())
    benchmark = open_benchmark("textvqa", tmp_path)
    assert benchmark.settings == {"ocr_tokens": False}
    assert [question.text for question in benchmark.questions] == [line["text"] for line in lines_of(tmp_path / QUESTIONS[1])]
