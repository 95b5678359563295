"""``alignkd benchmark report``: figures by hand, pages parsed, hostile text, and one message for what is no result."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from benchmark_outs import BENCHMARKS, SIX, edit_lines, edit_result, opposite, write_files, write_out
from report_pages import Page
from test_cli_imports import loaded
from tiny_runs import STUDENT, TEACHER

from alignkd.errors import AlignkdError
from alignkd.pipeline.config.benchmark_report import BenchmarkReportConfig
from alignkd.pipeline.evaluate.benchmarks.registry import BENCHMARKS as NAMES
from alignkd.pipeline.evaluate.benchmarks.registry import open_benchmark
from alignkd.pipeline.evaluate.statistics import wilson_interval
from alignkd.pipeline.report.benchmarks.comparison import compare
from alignkd.pipeline.report.benchmarks.differing import MOST_SHOWN
from alignkd.pipeline.report.benchmarks.formulas import category_figures, sums_of
from alignkd.pipeline.report.benchmarks.out_folders import Line, Result, read_models
from alignkd.pipeline.report.benchmarks.published import PUBLISHED, why_not_comparable
from alignkd.pipeline.report.benchmarks.report import benchmark_report, figures_in_words


def third_wrong(place, text):
    return opposite(text) if place % 3 == 0 else text


@pytest.fixture(scope="module")
def outs(tmp_path_factory):
    """A model, and a worse one that was run in another dtype."""
    folder = tmp_path_factory.mktemp("outs")
    first = write_out(folder / "a", "runs/sft/student")
    second = write_out(folder / "b", "runs/align/student", change=third_wrong, dtype="float16")
    return first, second


@pytest.fixture
def made(outs, tmp_path):
    """The figures of the two models' page, its elements, and its table."""
    figures = report(*outs, to=tmp_path / "to")
    return figures, Page(tmp_path / "to" / "report.html"), (tmp_path / "to" / "report.md").read_text()


def report(*outs, to, **more):
    return benchmark_report(BenchmarkReportConfig(outs=tuple(map(str, outs)), to=str(to), **{"resamples": 200, **more}))


def result_of(out, name):
    return read_models([str(out)])[0].results[name]


@pytest.mark.parametrize("protocol", ["mobilevlm", "lmms-eval"])
@pytest.mark.parametrize("change", [None, third_wrong])
def test_sums_over_pictures_give_the_scorers_figure_of_every_benchmark(tmp_path, protocol, change):
    out = write_out(tmp_path / "out", names=NAMES, protocol=protocol, change=change)
    for result in read_models([str(out)])[0].results.values():
        assert sums_of(result.benchmark, protocol, result.lines).value == pytest.approx(result.score, abs=1e-9)


def test_a_resample_is_worth_what_the_scorer_gives_for_its_pictures(outs):
    """POPE with a picture drawn twice: the scorer's counts are added, and F1 is made of them."""
    result = result_of(outs[0], "pope")
    sums = sums_of("pope", "mobilevlm", result.lines)
    weights = np.random.default_rng(0).integers(0, 3, len(sums.pictures))
    counts = {}
    for line in result.lines:
        weight = weights[sums.pictures.index("\n".join(line.images))]
        key = line.category, line.parsed, line.answers[0]
        counts[key] = counts.get(key, 0) + weight
    f1 = []
    for category in {line.category for line in result.lines}:
        tp, fp, fn = (counts.get((category, *pair), 0) for pair in (("yes", "yes"), ("yes", "no"), ("no", "yes")))
        precision, recall = tp / max(1, tp + fp), tp / max(1, tp + fn)
        f1.append(2 * precision * recall / (precision + recall) if tp else 0)
    assert float(sums.figure(weights @ sums.sums_PK)) == pytest.approx(100 * np.mean(f1), abs=1e-9)


def test_categories_are_those_of_the_scorer(outs):
    expected = json.loads((BENCHMARKS / "mme" / "expected.json").read_text())["references"]["official"]["scores"]
    assert category_figures(result_of(outs[0], "mme")) == {**expected["perception_tasks"], **expected["cognition_tasks"]}
    expected = json.loads((BENCHMARKS / "mmbench" / "expected.json").read_text())["references"]["opencompass"]["scores"]
    assert category_figures(result_of(outs[0], "mmbench")) == pytest.approx(
        {k: 100 * v for k, v in expected["category"].items()}
    )
    expected = json.loads((BENCHMARKS / "pope" / "expected.json").read_text())["references"]["llava"]["scores"]["categories"]
    assert category_figures(result_of(outs[0], "pope")) == pytest.approx({k: 100 * v["f1"] for k, v in expected.items()})


def test_scores_averages_and_intervals_are_on_the_page_in_the_table_and_in_the_figures(made):
    figures, page, table = made
    assert "sft/student: GQA 40.0" in figures_in_words(figures)
    first = figures["models"][0]
    scores = {name: found["score"] for name, found in first["benchmarks"].items()}
    expected = (sum(scores.values()) - scores["mme"] + scores["mme"] / 20) / 6
    assert first["average"]["value"] == pytest.approx(expected)
    assert first["average"]["interval_95"][0] < expected < first["average"]["interval_95"][1]
    low, high = wilson_interval(6, 17)
    assert first["benchmarks"]["sqa"]["interval_95"] == pytest.approx([100 * low, 100 * high])
    assert [first["benchmarks"][name]["method"] for name in SIX] == [
        *("bootstrap by picture", "Wilson", *["bootstrap by picture"] * 4)
    ]
    assert f"{expected:.1f}" in table.splitlines()[2]
    (row,) = [row for row in page.tables[0] if row[0].startswith("ScienceQA")]
    assert row[1].startswith("35.3")
    assert f"{100 * low:.1f} to {100 * high:.1f}" in row[1]


def test_equal_models_differ_by_nothing_and_no_difference_depends_on_the_order(outs, tmp_path):
    copy = shutil.copytree(outs[0], tmp_path / "copy")
    figures = report(outs[0], copy, outs[1], to=tmp_path / "to")
    same, worse, _ = figures["pairs"]
    assert {(one["difference"], one["p"], one["first_better"]) for one in same["benchmarks"].values()} == {(0.0, 1.0, 0)}
    assert (same["average"]["difference"], same["average"]["p"]) == (0.0, 1.0)
    (turned,) = report(outs[1], outs[0], to=tmp_path / "turned")["pairs"]
    for name, one in worse["benchmarks"].items():
        other = turned["benchmarks"][name]
        assert other["difference"] == pytest.approx(-one["difference"])
        assert other["p"] == one["p"]
        assert (one["first_better"], one["second_better"]) == (other["second_better"], other["first_better"])


def test_the_same_folders_give_the_same_bytes(outs, tmp_path):
    for name in ("one", "two"):
        report(*outs, to=tmp_path / name)
    assert (tmp_path / "one" / "report.html").read_bytes() == (tmp_path / "two" / "report.html").read_bytes()


def test_settings_that_differ_and_few_pictures_are_warned_of(made):
    figures, page, _ = made
    assert [words for words in figures["warnings"] if "dtype differs: float32 (sft/student); float16 (align/student)" in words]
    assert any("fewer than 30 pictures" in words for words in figures["warnings"])
    assert not any("ScienceQA-IMG" in words for words in figures["warnings"] if "pictures" in words)
    assert all(" ".join(words.split()) in page.text for words in figures["warnings"])


def test_a_model_without_all_six_has_no_average_and_the_page_says_what_is_missing(outs, tmp_path):
    few = write_out(tmp_path / "few", "models/few", names=("gqa", "pope"))
    figures = report(outs[0], few, to=tmp_path / "to")
    assert figures["models"][1]["average"]["why_none"] == "lacks sqa, textvqa, mme, mmbench"
    assert set(figures["pairs"][0]["benchmarks"]) == {"gqa", "pope"}
    assert figures["pairs"][0]["average"] is None
    assert "none: lacks sqa, textvqa, mme, mmbench" in Page(tmp_path / "to" / "report.html").text


def test_a_limited_run_is_marked_and_compared_on_what_is_shared_alone(outs, tmp_path):
    keep = lambda benchmark: [place for unit in benchmark.units()[:9] for place in unit]  # noqa: E731
    few = write_out(tmp_path / "few", "models/few", names=("gqa", "sqa", "mmbench"), keep=keep, limit=9)
    figures = report(outs[0], few, to=tmp_path / "to")
    page, table = Page(tmp_path / "to" / "report.html"), (tmp_path / "to" / "report.md").read_text()
    assert "limited to 9 questions" in page.text
    assert "limited to 9 questions" in table
    assert any("limited to the first questions: few (9)" in words for words in figures["warnings"])
    assert any("few are compared on" in words for words in figures["warnings"])
    assert {one["difference"] for one in figures["pairs"][0]["benchmarks"].values()} == {0.0}
    assert why_not_comparable(result_of(few, "gqa")) == "a limited run"
    assert not any(row.name in page.text + table for row in PUBLISHED)


def test_protocols_are_never_compared(outs, tmp_path):
    other = write_out(tmp_path / "lmms", "models/lmms", names=("gqa",), protocol="lmms-eval")
    figures = report(outs[0], other, to=tmp_path / "to")
    assert figures["pairs"][0]["benchmarks"] == {}
    assert "protocol" in figures["pairs"][0]["left_out"]["GQA"]
    assert any("protocol differs: mobilevlm (student); lmms-eval (lmms)" in w.replace("sft/", "") for w in figures["warnings"])


def many(name, count, lines_a_picture=1):
    line = Line(0, "What?", (), "a", "a", ("a",), 1.0, "", True)
    return tuple(
        replace(line, id=place, images=(f"{place // lines_a_picture}.jpg",), score=place % 2) for place in range(count)
    )


def test_published_figures_stand_beside_all_official_questions_only(tmp_path):
    lines = [
        {"id": line.id, "question": "What?", "image": line.images[0], "prediction": "a", "parsed": "a"}
        | {"answers": ["a"], "score": line.score, "category": "", "counted": True}
        for line in many("gqa", 12_578, 32)
    ]
    result = {"benchmark": "gqa", "title": "GQA", "protocol": "mobilevlm", "score": 50.0, "unit": "percent", "metrics": {}}
    result |= {"questions": len(lines), "notes": [], "settings": {}, "model": "m", "folder": str(tmp_path)}
    write_files(tmp_path / "out" / "gqa", result, lines)
    report(tmp_path / "out", to=tmp_path / "to", resamples=2000)
    page, table = Page(tmp_path / "to" / "report.html"), (tmp_path / "to" / "report.md").read_text()
    shown = {row[0]: row[1:] for row in page.table("MobileVLM 1.7B")}
    assert shown["GQA, %"] == ["56.1", "59.0", "59.3", "61.1", "62.6"]
    assert "arXiv:2402.03766" in shown["source"][2]
    assert "MobileVLM V2 7B, published" in table
    assert "72.1" not in table + page.text  # an average is not shown beside one benchmark


def test_the_averages_of_the_published_rows_are_those_of_their_scores():
    for row in PUBLISHED:
        average = (sum(row.scores.values()) - row.scores["mme"] + row.scores["mme"] / 20) / 6
        assert average == pytest.approx(row.average, abs=0.07)  # the 7B's is 72.04, printed as 72.1


EVIL = "<script>alert(1)</script>|`*\u202e\x1b[2J\"'><img src='http://example.invalid/x.png'>"


def test_text_of_others_is_escaped_on_the_page_and_in_the_table(tmp_path):
    first = write_out(tmp_path / "a", f"models/{EVIL}")
    second = write_out(tmp_path / "b", "models/second", change=third_wrong, **{EVIL: EVIL})
    for out in (first, second):
        for name in ("gqa", "textvqa"):
            edit_lines(out, name, lambda line: {**line, "id": f"{line['id']}{EVIL}", "question": EVIL, "category": EVIL})
        edit_lines(out, "gqa", lambda line: {**line, "prediction": EVIL, "parsed": EVIL, "answers": [EVIL]})
        edit_result(out, "gqa", title=EVIL, notes=[EVIL])
    report(first, second, to=tmp_path / "to")
    page, table = Page(tmp_path / "to" / "report.html"), (tmp_path / "to" / "report.md").read_text()
    assert "<script>alert(1)</script>" in page.text
    assert "\u202e" not in page.text + table
    assert "<" not in table
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_differing_questions_are_shown_with_their_pictures(made):
    figures, page, _ = made
    counts = figures["pairs"][0]["benchmarks"]["mmbench"]
    assert counts["first_better"] > 8
    assert f"sft/student better on {counts['first_better']}, align/student better on {counts['second_better']}" in page.text
    assert f"8 of {counts['first_better']} are shown" in page.text
    pictures = {name for name in SIX if any(image in page.images for image in _pictures(name))}
    assert pictures == set(SIX)  # MMBench's are inside its table


def _pictures(name):
    return {image for question in open_benchmark(name, BENCHMARKS).questions for image in question.images}


def test_pictures_that_cannot_be_read_are_said_to_be_missing_and_links_out_of_the_folder_are_not_followed(outs, tmp_path):
    copies = [shutil.copytree(out, tmp_path / out.name) for out in outs]
    data = shutil.copytree(BENCHMARKS / "gqa", tmp_path / "gqa")
    for number, path in enumerate(sorted((data / "images").iterdir())):
        path.unlink()
        if number % 2:
            path.write_bytes(b"no picture")
    for copy in copies:
        edit_result(copy, "gqa", folder=str(data))
        edit_result(copy, "pope", folder="/nowhere")
        edit_lines(copy, "sqa", lambda line: {**line, "image": line["image"] and "../../../../../etc/passwd"})
    report(*copies, to=tmp_path / "to")
    page = Page(tmp_path / "to" / "report.html")
    assert "picture not readable here" in page.text
    assert "/nowhere is not a folder on this machine" in page.text


def test_a_page_over_many_models_holds_a_limited_number_of_pictures(tmp_path):
    made = [write_out(tmp_path / str(n), f"models/{n}", change=third_wrong if n % 2 else None) for n in range(6)]
    report(*made, to=tmp_path / "to")
    assert len(Page(tmp_path / "to" / "report.html").images) <= MOST_SHOWN


def test_models_of_one_name_are_told_apart(tmp_path):
    made = [
        write_out(tmp_path / name, model, names=("gqa",))
        for name, model in (("a", "runs/one/student"), ("b", "runs/two/student"), ("c", "runs/two/student"), ("d", "plain"))
    ]
    names = [model["name"] for model in report(*made, to=tmp_path / "to")["models"]]
    assert names[0] == "one/student"
    assert names[1:3] == [f"two/student ({tmp_path / 'b'})", f"two/student ({tmp_path / 'c'})"]
    assert names[3] == "plain"


def damaged(name):
    """What is done to a whole output folder, and what the message must say."""
    return {
        "not a folder": (lambda out: shutil.rmtree(out), "is not a folder"),
        "another folder": (lambda out: [shutil.rmtree(out / name) for name in ("gqa", "pope")], "holds no benchmark"),
        "half-written": (lambda out: (out / "pope" / "result.json").unlink(), "not finished"),
        "no predictions": (lambda out: (out / "gqa" / "predictions.jsonl").unlink(), "lacks predictions.jsonl"),
        "cut short": (lambda out: _cut(out / "gqa" / "predictions.jsonl"), "not JSON"),
        "a line less": (lambda out: _drop(out / "gqa" / "predictions.jsonl"), "tells of 40 questions, predictions.jsonl of 39"),
        "other protocol": (lambda out: edit_result(out, "gqa", protocol="another"), "known are mobilevlm, lmms-eval"),
        "other benchmark": (lambda out: edit_result(out, "gqa", benchmark="pope"), "is a result of 'pope'"),
        "other models": (lambda out: edit_result(out, "gqa", model="another"), "several models"),
        "other score": (lambda out: edit_result(out, "gqa", score=41.0), "not of one run"),
        "no number": (lambda out: edit_result(out, "gqa", score=float("nan")), "expected numbers"),
        "no object": (lambda out: (out / "gqa" / "result.json").write_text("[]"), "is not an object"),
        "types": (lambda out: edit_result(out, "gqa", settings=[]), "'settings' is"),
        "score of a line": (lambda out: edit_lines(out, "gqa", lambda line: {**line, "score": 2}), "expected 0 to 1"),
        "image of a line": (lambda out: edit_lines(out, "gqa", lambda line: {**line, "image": 3}), "are to be texts"),
        "id of a line": (lambda out: edit_lines(out, "gqa", lambda line: {**line, "id": None}), "'id' is None"),
        "a long name": (lambda out: edit_result(out, "gqa", title="x" * 5000), "5,000 characters"),
        "a category": (lambda out: edit_lines(out, "pope", lambda line: {**line, "category": "x"}), "none of its categories"),
        "a huge number": (lambda out: edit_result(out, "gqa", score=10**400), "'score' is"),
        "a pipe": (lambda out: _pipe(out / "gqa" / "result.json"), "named pipe"),
    }[name]


def _cut(path):
    path.write_text(path.read_text()[:-20])


def _drop(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


def _pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "name",
    [
        *("not a folder", "another folder", "half-written", "no predictions", "cut short", "a line less", "other protocol"),
        *("other benchmark", "other models", "other score", "no number", "no object", "types", "score of a line"),
        *("image of a line", "id of a line", "a pipe", "a long name", "a category", "a huge number"),
    ],
)
def test_what_is_no_result_is_refused_with_one_message(tmp_path, name):
    out = write_out(tmp_path / "out", names=("gqa", "pope"))
    spoil, words = damaged(name)
    spoil(out)
    with pytest.raises(AlignkdError, match=re.escape(words)):
        report(out, to=tmp_path / "to")
    assert not (tmp_path / "to").exists()


@pytest.mark.slow
def test_the_command_prints_figures_and_refuses_with_exit_code_2(door, outs, tmp_path):
    shown = door("benchmark", "report", *outs, "--to", tmp_path / "to", "--json", "--resamples", 200)
    assert shown.code == 0, shown.stderr
    assert [model["name"] for model in json.loads(shown.stdout)["models"]] == ["sft/student", "align/student"]
    for words in ([], [outs[0], outs[0]]):
        refused = door("benchmark", "report", *words, "--to", tmp_path / "to")
        assert (refused.code, refused.stdout, refused.stderr.count("\n")) == (2, "", 1), refused.stderr


def test_a_report_loads_no_torch(outs, tmp_path):
    assert list(loaded(["benchmark", "report", *outs, "--to", tmp_path / "to", "--resamples", 100]).values()) == [[]]


@pytest.mark.slow
def test_what_the_runner_wrote_is_read_as_it_is(door, tmp_path):
    names = "gqa,textvqa,mmbench,pope"
    for out, model in (("a", STUDENT), ("b", TEACHER)):
        words = ["--model", model, "--benchmark", names, "--root", BENCHMARKS, "--out", tmp_path / out, "--device", "cpu"]
        finished = door("benchmark", "run", *words, "--limit", 6)
        assert finished.code == 0, finished.stderr
    figures = report(tmp_path / "a", tmp_path / "b", to=tmp_path / "to")
    for model, out in zip(figures["models"], "ab", strict=True):
        assert set(model["benchmarks"]) == set(names.split(","))
        for name, found in model["benchmarks"].items():
            written = json.loads((tmp_path / out / name / "result.json").read_text())
            assert (found["score"], found["limit"]) == (written["score"], 6)
    assert set(figures["pairs"][0]["benchmarks"]) == set(names.split(","))
    assert not any("weights" in words for words in figures["warnings"])


def test_prompts_with_and_without_ocr_tokens_are_compared_with_a_warning(outs, tmp_path):
    other = shutil.copytree(outs[1] / "textvqa", tmp_path / "b" / "textvqa").parent
    edit_lines(other, "textvqa", lambda line: {**line, "question": re.sub("\nReference OCR token.*", "", line["question"])})
    found = json.loads((other / "textvqa" / "result.json").read_text())
    edit_result(other, "textvqa", settings={**found["settings"], "ocr_tokens": False})
    figures = report(outs[0], other, to=tmp_path / "to")
    assert figures["pairs"][0]["benchmarks"]["textvqa"]["questions"] == 33
    assert any("TextVQA: ocr tokens differs: true" in words for words in figures["warnings"])


def test_labels_of_another_version_of_the_data_are_not_the_same_questions(outs, tmp_path):
    other = shutil.copytree(outs[0] / "pope", tmp_path / "b" / "pope").parent
    turned = {"yes": "no", "no": "yes"}

    def turn(line):
        return {**line, "answers": [turned[line["answers"][0]]], "parsed": turned[line["parsed"]], "prediction": "turned"}

    edit_lines(other, "pope", turn)
    lines = result_of_lines(other, "pope")
    edit_result(other, "pope", score=sums_of("pope", "mobilevlm", lines).value)
    figures = report(outs[0], other, to=tmp_path / "to")
    assert figures["pairs"][0]["left_out"] == {"POPE": "they share no picture with the same questions"}


def result_of_lines(out, name):
    lines = [json.loads(line) for line in (out / name / "predictions.jsonl").read_text().splitlines()]
    texts = ("question", "prediction", "parsed", "category", "counted", "score", "id")
    return [
        Line(**{key: line[key] for key in texts}, images=(line["image"],), answers=tuple(line["answers"])) for line in lines
    ]


def test_twelve_thousand_questions_are_compared_on_pictures_not_on_questions():
    lines = many("gqa", 12_578, 32)
    results = [Result("gqa", "GQA", "mobilevlm", 50.0, "percent", model, "", (), {}, lines) for model in "ab"]
    sums = sums_of("gqa", "mobilevlm", results[0].lines)
    assert sums.sums_PK.shape == (394, 2)


def test_compare_gives_a_benchmark_the_same_draws_whatever_stands_beside_it(outs):
    models = read_models(list(map(str, outs)))
    alone = [replace(model, results={"pope": model.results["pope"]}) for model in models]
    both = [compare(found, resamples=100, seed=3) for found in (models, alone)]
    pope = [next(one for one in found.pairs[0].compared if one.benchmark == "pope") for found in both]
    assert np.array_equal(pope[0].differences_B, pope[1].differences_B)
