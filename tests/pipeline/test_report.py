"""``alignkd report``: what a run's folder says is on one page that fetches nothing, and what is missing is named."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from report_pages import Page, log_line, write_run
from tiny_runs import IMAGES, SAMPLES, STUDENT, stage_two_config, write_data

from alignkd.cli import main
from alignkd.errors import AlignkdError
from alignkd.losses.recipes import get_recipe, recipe_record
from alignkd.pipeline.commands.options.from_config import from_options
from alignkd.pipeline.config.distill import DistillConfig
from alignkd.pipeline.config.report import ReportConfig
from alignkd.pipeline.report import charts
from alignkd.pipeline.report.attention_grid import Seen, attention_grid, head_grid
from alignkd.pipeline.report.charts import Curve, Panel
from alignkd.pipeline.report.run_page import report
from alignkd.pipeline.report.runs.command import command_to_repeat
from alignkd.pipeline.report.runs.reading import read_runs
from alignkd.pipeline.report.runs.run import unique_names
from alignkd.pipeline.report.words import adding_up

EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>'\"&amp;\x1b]0;owned\x07\u202e"


def page_of(tmp_path, *runs, **asked):
    figures = report(ReportConfig(runs=tuple(map(str, runs)), to=str(tmp_path / "page"), device="cpu", **asked))
    return Page(tmp_path / "page" / "report.html"), figures


@pytest.fixture(scope="module")
def whole(run, data, tmp_path_factory):
    """The page of a real run with the answers of its student."""
    tmp_path = tmp_path_factory.mktemp("whole")
    out = shutil.copytree(run, tmp_path / "run")
    lines = [
        {"id": sample["id"], "question": "<image>\nWhat?", "image": sample.get("image"), "prediction": "x", "reference": "y"}
        for sample in SAMPLES
    ]
    (out / "evaluation").mkdir()
    answers = [{**line, "correct": place % 2 == 0} for place, line in enumerate(lines)]
    (out / "evaluation" / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in answers))
    (out / "evaluation" / "result.json").write_text(json.dumps({"accuracy": 0.5, "interval_95": [-1e-17, 0.8]}))
    return page_of(tmp_path, out, samples=2)


def test_a_run_is_shown_whole(whole):
    page, figures = whole
    for title in (
        "Training run run",
        "Warnings",
        "Loss, term by term",
        "Shares of the terms",
        "Throughput and memory",
        "Where the text looks",
        "Sample predictions",
        "The cache",
        "the command that repeats the run",
    ):
        assert title in page.text
    (run,) = figures["runs"]
    assert run["state"] == "finished"
    assert set(run["terms"]) == {"supervised", "reverse_kl", "attention", "vision_all", "vision_focus"}
    for term in run["terms"]:
        assert any(alt.startswith(f"{term.replace('_', ' ')}: run ") for alt in page.images), term
    assert "50.0 %, 95 % interval 0.0 % to 80.0 %; 6 answers" in page.text
    assert sum(alt.startswith("image of ") for alt in page.images) == 5  # one sample has none
    assert "no image" in page.text


def test_attention_is_drawn_before_and_after_with_heads_in_order(whole):
    page, figures = whole
    assert set(figures["attention_on_image"]) == {"at the start", "trained"}
    assert all(0 < share < 1 for shares in figures["attention_on_image"].values() for share in shares)
    for name in ("at the start", "trained"):
        assert sum(alt.startswith(f"attention of {name}, at most") for alt in page.images) == 2
        heads = [alt.split(",")[1] for alt in page.images if alt.startswith(f"attention of {name}, head")]
        assert heads == [f" head {number}" for number in range(len(heads))]
        assert len(heads) == 4


def test_the_shares_and_the_cache_add_up_as_printed(whole):
    page, figures = whole
    rows = page.table("last values")[1:]
    for column, end in ((2, ""), (3, " %")):
        parts = [float(row[column].removesuffix(end)) for row in rows]
        assert sum(parts[:-1]) == pytest.approx(parts[-1], abs=1e-9)
    assert rows[-1][3] == "100.0 %"
    rows = page.table("bytes a sample")[1:]
    assert rows[-1][0] == "in all"
    for column in (1, 2):
        parts = [0.0 if row[column] == "–" else float(row[column].removesuffix(" kB").replace(",", "")) for row in rows]
        assert sum(parts[:-1]) == pytest.approx(parts[-1], abs=1e-9)
    (cache,) = figures["caches"].values()
    assert float(rows[-1][1].removesuffix(" kB")) == pytest.approx(cache["bytes"] / 6 / 1000, abs=0.01)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=12), st.integers(0, 4))
def test_printed_parts_add_up_and_each_is_within_one_unit(parts, digits):
    each, total = adding_up(parts, digits)
    as_units = [round(float(text.replace(",", "")) * 10**digits) for text in each]
    assert sum(as_units) == round(float(total.replace(",", "")) * 10**digits)
    assert all(abs(units - part * 10**digits) < 1 + 1e-6 for units, part in zip(as_units, parts, strict=True))


@pytest.mark.slow
def test_runs_side_by_side_show_what_differs_alone(tmp_path):
    lines = [log_line(step) for step in (1, 2, 3)]
    first = write_run(tmp_path / "a" / "out", lines, learning_rate=1e-3)
    second = write_run(tmp_path / "b" / "out", lines[:2], learning_rate=2e-3, recipe="sft", lora=True)
    same = {"student": "s", "data": "d", "cache": "c"}
    for folder in (first, second):
        record = json.loads((folder / "run.json").read_text())
        record["configuration"] |= same
        (folder / "run.json").write_text(json.dumps(record))
    page, figures = page_of(tmp_path, first, second, samples=0)
    assert [run["name"] for run in figures["runs"]] == [str(Path("a/out")), str(Path("b/out"))]
    different = figures["settings_that_differ"]
    assert different["learning_rate"] == [1e-3, 2e-3]
    assert different["lora"] == ["not set", True]
    assert different["recipe.name"] == ["align-kd", "sft"]
    assert not {"student", "data", "out", "max_length", "recipe.temperature"} & set(different)
    (shown,) = [table for table in page.tables if table[0] == ["setting", "a/out", "b/out"]]
    assert {row[0] for row in shown[1:]} == set(different)
    assert ["learning_rate", "0.001", "0.002"] in shown
    assert any(alt.startswith("loss: a/out") and "b/out" in alt for alt in page.images)


@pytest.mark.slow
def test_a_run_that_is_not_finished_says_so_and_its_torn_line_is_left_out(tmp_path):
    folder = write_run(tmp_path / "run", [log_line(1), log_line(2)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 1.')
    page, figures = page_of(tmp_path, folder, samples=1)
    assert figures["runs"][0]["state"] == "not finished: stopped at step 2 of 100; distill continues it with --resume"
    assert figures["runs"][0]["step"] == 2
    assert "the last line of metrics.jsonl is cut short" in page.text
    assert "its warnings come into result.json when it ends" in page.text
    assert "gone.json: No such file or directory; where the data is elsewhere, give --data and --images" in page.text
    assert "gone-cache cannot be read here" in page.text
    assert "no predictions" in page.text


def test_a_run_before_its_first_line_is_a_page(tmp_path):
    folder = write_run(tmp_path / "run", [])
    (folder / "metrics.jsonl").unlink()
    page, figures = page_of(tmp_path, folder, samples=0)
    assert figures["runs"][0]["state"].startswith("not finished: stopped before its first log line")
    assert "no line yet, so there are no curves" in page.text
    assert not page.images


def test_a_run_that_goes_on_is_said_to_run(tmp_path):
    from alignkd.pipeline.runtime.out_folder.holder import Holder

    folder = write_run(tmp_path / "run", [log_line(1)])
    (folder / "run.lock").write_text(json.dumps(dataclasses.asdict(Holder.here())))
    assert read_runs([folder])[0].state == "runs now, at step 1 of 100"


@pytest.mark.slow
def test_samples_without_a_trained_student_say_when_it_comes(tmp_path, data):
    folder = write_run(tmp_path / "run", [log_line(1)], student=str(STUDENT), data=str(data))
    page, figures = page_of(tmp_path, folder, samples=1)
    assert "trained: it is written when the run ends" in page.text
    assert figures["attention_on_image"]["trained"] == [None]
    assert figures["attention_on_image"]["at the start"][0] > 0


def test_samples_without_images_are_said_to_have_none(tmp_path):
    data = write_data(tmp_path / "d.json", [sample for sample in SAMPLES if sample["id"] == "text4"])
    folder = write_run(tmp_path / "run", [log_line(1)], student=str(STUDENT), data=str(data), cache=None, recipe="sft")
    page, _ = page_of(tmp_path, folder, samples=2)
    assert "has an image" in page.text
    assert "no cache: the recipe needs no teacher" in page.text


def test_held_out_figures_are_shown_whatever_they_are_called(tmp_path):
    counted = {"eval/samples": 9, "eval/seconds": 0.25}
    first = {"step": 1, "eval/supervised": 3.0, "eval/gqa": 20.0, **counted}
    lines = [log_line(1), first, log_line(2), {"step": 2, "eval/supervised": 2.5}]
    page, figures = page_of(tmp_path, write_run(tmp_path / "run", lines), samples=0)
    assert figures["held_out"] == {"run": {"eval/supervised": 2.5, "eval/gqa": 20.0, **counted}}
    assert "supervised: run 3 at step 1, 2.5 at step 2" in page.images
    rows = page.table("first")[1:]
    assert rows[:2] == [["supervised", "3", "2.5", "2"], ["gqa", "20", "20", "1"]]
    assert rows[2:] == [["samples", "9", "9", "1"], ["seconds", "0.25", "0.25", "1"]]
    assert sum(alt.startswith(("samples: ", "seconds: ")) for alt in page.images) == 0


@pytest.mark.slow
def test_values_that_json_could_not_hold_are_gaps(tmp_path):
    folder = write_run(tmp_path / "run", [log_line(1), log_line(2, loss=None, supervised=10**40), log_line(3)])
    page, _ = page_of(tmp_path, folder, samples=0)
    assert any(alt.startswith("loss: run 2.1 at step 1, 0.7667 at step 3") for alt in page.images)


@pytest.mark.slow
def test_warnings_are_shown(tmp_path):
    folder = write_run(
        tmp_path / "run", [log_line(1)], result={"warnings": ["attention was below 1%", "cut <b>"], "processes": 2}
    )
    page, figures = page_of(tmp_path, folder, samples=0)
    assert "attention was below 1%" in page.text
    assert "cut <b>" in page.text
    assert figures["warnings"] == {"run": ["attention was below 1%", "cut <b>"]}
    assert figures["runs"][0]["command"].startswith("torchrun --nproc-per-node 2 --no-python alignkd distill ")


@pytest.mark.slow
def test_a_run_that_was_resumed_with_learned_weights_and_lora_says_so(tmp_path):
    lines = [log_line(step, **{"precision/attention": 1.0 + step}) for step in (1, 2)]
    folder = write_run(tmp_path / "run", lines, result={"warnings": []}, recipe="beta-kd", lora=True, resume=True)
    page, _ = page_of(tmp_path, folder, samples=0)
    assert "resumed 2026-03-01" in page.text
    assert "beta-kd, weights learned" in page.text
    assert "low-rank updates (LoRA)" in page.text
    assert "learned precision: attention: run 2 at step 1, 3 at step 2" in page.images
    assert "--resume" not in page.text


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**40), 10**40) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
SETTINGS = (
    "student",
    "data",
    "cache",
    "recipe",
    "template",
    "max_length",
    "steps",
    "samples",
    "resume",
    "lora",
    "plugins",
    "x",
)
FIGURES = ("loss", "supervised", "weighted/supervised", "share/supervised", "eval/x", "seconds", "samples", "precision/x", "y")
RESULTS = ("warnings", "seconds", "processes", "terms")


@pytest.mark.slow
@settings(max_examples=15, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))  # a page takes a second
@given(
    st.dictionaries(st.sampled_from(SETTINGS), VALUES),
    st.lists(st.dictionaries(st.sampled_from(FIGURES), VALUES), max_size=3),
    st.dictionaries(st.sampled_from(RESULTS), VALUES),
    st.dictionaries(st.sampled_from(("versions", "started", "arguments")), VALUES),
)
def test_whatever_the_files_hold_there_is_a_page_or_one_message(tmp_path_factory, chosen, lines, result, record):
    tmp_path = tmp_path_factory.mktemp("any")
    folder = write_run(tmp_path / "run", [{"step": step, **line} for step, line in enumerate(lines)], result=result)
    found = json.loads((folder / "run.json").read_text())
    found["configuration"] |= chosen
    (folder / "run.json").write_text(json.dumps(found | record))
    try:
        page_of(tmp_path, folder, write_run(tmp_path / "other", [log_line(1)]), samples=0)
    except AlignkdError:
        assert not isinstance(chosen.get("recipe", {}), dict)


@pytest.mark.slow
def test_text_from_others_is_escaped_wherever_it_is_shown(tmp_path):
    data = write_data(tmp_path / "d.json", [{**SAMPLES[0], "id": EVIL}])
    folder = write_run(
        tmp_path / "<script>alert(2)<",
        [
            log_line(
                1, **{f"eval/{EVIL}": 1.0, f"weighted/{EVIL}": 1.0, EVIL: 2.0, f"share/{EVIL}": 0.1, f"precision/{EVIL}": 1.0}
            )
        ],
        result={"warnings": [EVIL]},
        student=str(STUDENT),
        data=str(data),
        cache=EVIL.replace("\x1b]0;owned\x07", ""),
        **{EVIL: EVIL},
    )
    record = json.loads((folder / "run.json").read_text())
    record["configuration"]["recipe"]["name"] = record["versions"][EVIL] = record["started"] = EVIL
    record["arguments"] = ["distill", EVIL]
    (folder / "run.json").write_text(json.dumps(record))
    answers = tmp_path / "answers"
    answers.mkdir()
    line = {"id": EVIL, "question": EVIL, "image": EVIL, "prediction": EVIL, "reference": EVIL, "correct": True}
    (answers / "predictions.jsonl").write_text(json.dumps(line) + "\n")
    page, _ = page_of(tmp_path, folder, samples=1, predictions=(str(answers),))
    assert page.text.count("<script>alert(1)</script>") > 10
    raw = page.path.read_text()
    assert "<script" not in raw
    assert not set(raw) & {"\x1b", "\x07", "\u202e"}


def test_credentials_are_not_shown(tmp_path):
    secret, token = "hunter2hunter2", "hf_" + "a1B2" * 8
    folder = write_run(tmp_path / "run", [log_line(1)], cache=None, online_teacher=f"s3://me:{secret}@host/b?sig={secret}")
    record = json.loads((folder / "run.json").read_text())
    record["arguments"] = ["distill", "--password", secret, f"--x={token}"]
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "result.json").write_text(json.dumps({"warnings": [f"could not read s3://me:{secret}@host/x"]}))
    page, figures = page_of(tmp_path, folder, samples=0)
    for shown in (page.path.read_text(), json.dumps(figures)):
        assert secret not in shown
        assert token not in shown
    assert "REDACTED" in page.text


COMMANDS = {
    "defaults": {},
    "an own recipe": {
        "recipe": "align-kd",
        "overrides": {"name": "mine", "vision": "0.5", "normalise": "false", "focus_k": "4"},
    },
    "numbers of a known recipe": {"recipe": "beta-kd", "overrides": {"temperature": "2.5", "attention_layers": "0,1"}},
    "many options": {
        "lora": True,
        "group_by_length": False,
        "report_to": ("none",),
        "batch_size": None,
        "batch_tokens": 4096,
        "max_steps": 7,
        "projector_learning_rate": 1e-3,
        "max_rejected": "5%",
        "plugins": ("a b.py", "c.py"),
        "dtype": "bfloat16",
        "online_teacher": "the teacher",
    },
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_of_the_page_is_the_run_again(tmp_path, name):
    config = stage_two_config(tmp_path / "d a'ta.json", tmp_path / "cache", tmp_path / "out", **COMMANDS[name])
    record = {**dataclasses.asdict(config), "recipe": recipe_record(config.recipe)}
    folder = write_run(tmp_path / "run", [], **json.loads(json.dumps(record)))
    (run,) = read_runs([folder])
    words = shlex.split(command_to_repeat(run))
    assert words[:2] == ["alignkd", "distill"]
    parent = click.Context(main, info_name="alignkd", **main.context_settings)
    given = main.get_command(parent, "distill").make_context("distill", words[2:], parent=parent).params
    recipe = get_recipe(given.pop("recipe"), dict(text.split("=", 1) for text in given.pop("overrides")))
    again = from_options(DistillConfig, given, recipe=recipe)
    assert again == dataclasses.replace(config, out=f"{config.out}-again")


def damaged(folder, name, text):
    (folder / name).write_text(text)
    return folder


BAD = {
    "no run": (lambda t: [], ["no run is given", "--out folders"]),
    "a folder that is not there": (lambda t: [t / "none"], ["none does not exist"]),
    "a file": (lambda t: [write_data(t / "f.json", [])], ["f.json is not a folder"]),
    "a folder that is no run": (lambda t: [t], ["holds no run.json", "give the --out folder"]),
    "another command's folder": (
        lambda t: [damaged(t, "run.json", '{"command": "evaluate", "configuration": {}}')],
        ["alignkd evaluate wrote it"],
    ),
    "a record that is no JSON": (lambda t: [damaged(write_run(t / "r", []), "run.json", "{")], ["run.json is damaged"]),
    "a record without settings": (lambda t: [damaged(write_run(t / "r", []), "run.json", "{}")], ["no configuration"]),
    "a record of a million brackets": (
        lambda t: [damaged(write_run(t / "r", []), "run.json", "[" * 10**6)],
        ["run.json is damaged"],
    ),
    "a result that is a list": (lambda t: [damaged(write_run(t / "r", []), "result.json", "[]")], ["result.json is damaged"]),
    "a line that is damaged": (
        lambda t: [damaged(write_run(t / "r", []), "metrics.jsonl", '{"step": 1}\n{"step"\n{"step": 2}\n')],
        ["metrics.jsonl, line 2, is damaged"],
    ),
    "a step that is none": (
        lambda t: [damaged(write_run(t / "r", []), "metrics.jsonl", '{"step": -1}\n')],
        ["line 1, is damaged", "its step is '-1'"],
    ),
    "predictions that are none": (
        lambda t: [write_run(t / "r", []), "--predictions", t],
        ["holds no predictions.jsonl", "alignkd evaluate"],
    ),
    "more predictions than runs": (
        lambda t: [write_run(t / "r", []), "--predictions", t, "--predictions", t],
        ["given 2 times for 1 runs"],
    ),
    "a page where a file is": (
        lambda t: [write_run(t / "r", []), "--to", write_data(t / "f.json", [])],
        ["--to", "cannot be a folder"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_run_is_refused_with_one_message(door, tmp_path, name):
    make, parts = BAD[name]
    finished = door("report", "--to", tmp_path / "page", "--samples", 0, *make(tmp_path))
    assert finished.code == 2, finished.stderr
    assert "Traceback" not in finished.stderr
    assert sum(line.startswith("Error: ") for line in finished.stderr.splitlines()) == 1
    for part in parts:
        assert part in finished.stderr, finished.stderr
    assert not (tmp_path / "page").exists()


@pytest.mark.slow
def test_the_command_prints_its_figures_as_json(door, tmp_path):
    folder = write_run(tmp_path / "run", [log_line(1), log_line(4)])
    finished = door("report", folder, "--to", tmp_path / "page", "--samples", 0, "--json")
    assert finished.code == 0, finished.stderr
    figures = json.loads(finished.stdout)
    assert figures["report"] == str(tmp_path / "page" / "report.html")
    assert figures["runs"][0]["terms"]["attention"] == {"value": 1.0, "weighted": 0.1, "share": pytest.approx(1 / 6)}
    said = door("report", folder, "--to", tmp_path / "page", "--samples", 0)
    assert said.stdout.splitlines()[0].startswith("run: not finished: stopped at step 4 of 100")
    assert said.stdout.splitlines()[-1] == f"report: {tmp_path / 'page' / 'report.html'}"


@pytest.mark.slow
def test_a_page_without_attention_loads_no_torch(tmp_path, cache):
    folder = write_run(tmp_path / "run", [log_line(1)], cache=str(cache))
    words = ["report", str(folder), "--to", str(tmp_path / "page"), "--samples", "0"]
    code = f"import sys; from alignkd.cli import main; main({words!r}, standalone_mode=False); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert "bytes a sample" in Page(tmp_path / "page" / "report.html").text


@pytest.fixture
def axes(monkeypatch):
    """Draws a panel; what is drawn is kept instead of becoming a picture."""
    kept = []
    monkeypatch.setattr(charts, "embed", lambda figure, alt: kept.append(figure) or charts.Html())

    def draw(values, **about):
        charts.curves(Panel("figure", [Curve("run", range(len(values)), values)], **about))
        return kept[-1].axes[0]

    yield draw
    for figure in kept:
        charts.plt.close(figure)


@pytest.mark.parametrize(
    ("values", "about", "says"),
    [
        ([0.2, 1.0], {}, ""),
        ([9.0, 10.0], {}, "axis does not start at 0"),
        ([9.0, 10.0], {"zero": True}, ""),
        ([0.01, 1.0], {}, "logarithmic axis"),
        ([-1.0, 1.0], {}, ""),
        ([-10.0, -9.0], {}, "axis does not start at 0"),
        ([5.0], {}, "axis does not start at 0"),
        ([0.0, 0.0], {}, ""),
        ([math.nan], {}, "no finite value"),
    ],
)
def test_an_axis_that_does_not_start_at_zero_says_so(axes, values, about, says):
    drawn = axes(values, **about)
    assert drawn.get_title() == "figure" + (f"\n{says}" if says else "")
    low, high = drawn.get_ylim()
    if "axis" not in says and says != "no finite value":
        assert low <= 0 <= high


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5))
def test_a_linear_axis_without_zero_always_says_so(values):
    figure, drawn = charts.plt.subplots()
    note = charts._scale(drawn, Panel("p", [Curve("run", range(len(values)), values)]))
    low, high = drawn.get_ylim()
    charts.plt.close(figure)
    assert (note == "") == (low <= 0 <= high and drawn.get_yscale() == "linear")


def test_bars_of_accuracy_start_at_zero():
    figure = charts.interval_bars({"a": (0.9, 0.85, 0.95), "b": (0.0, -1e-18, 0.02)}, ("floor", 0.67))
    assert figure.axes[0].get_xlim()[0] == 0
    charts.plt.close(figure)


def test_long_curves_are_drawn_with_their_moving_mean():
    mean = charts._moving_mean([math.nan, *np.linspace(1, 2, 299)])
    assert len(mean) == 300
    assert math.isnan(mean[0])
    np.testing.assert_allclose(mean[1], 1.0)
    np.testing.assert_allclose(mean[-1], np.linspace(1, 2, 299)[-6:].mean())


def seen(scale, heads=2):
    from alignkd.inputs.regions import region

    attention_HTV = np.full((heads, 3, 6), scale, np.float32) * np.arange(1, heads + 1)[:, None, None]
    return Seen(np.zeros((4, 6, 3), np.float32), attention_HTV, region(0, (2, 3))[None])


@pytest.mark.slow
def test_all_panels_have_one_scale_which_one_bar_shows(monkeypatch):
    from alignkd.pipeline.report import attention_grid as module

    scales, bars = [], []
    monkeypatch.setattr(module, "overlay", lambda axes, picture, heat, title, most: scales.append(most))
    monkeypatch.setattr(module, "_bar", lambda most, label: bars.append(most) or module.Html())
    attention_grid([(["one", "two"], {"before": [seen(0.01), seen(0.02)], "after": [seen(0.04), "gone"]})])
    assert scales == pytest.approx([0.06] * 3)  # of the mean over two heads, the second of twice the first
    assert bars == pytest.approx([0.06])
    scales.clear()
    head_grid("one", {"before": seen(0.01), "after": seen(0.02, heads=20)})
    assert len(scales) == 2 + 16
    assert len(set(scales)) == 1


def test_names_tell_runs_apart():
    assert unique_names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert unique_names([Path("/x/a/out"), Path("/x/b/out"), Path("/c")]) == ["a/out", "b/out", "c"]
    assert unique_names([Path("/x/a"), Path("/x/a")]) == ["/x/a (1)", "/x/a (2)"]


@pytest.mark.slow
def test_answers_of_benchmarks_and_those_that_differ_are_shown(tmp_path):
    runs = []
    for name, score in (("a", 0.0), ("b", 1.0)):
        folder = write_run(tmp_path / name, [log_line(1)])
        place = folder / "evaluation" / "vqav2"
        place.mkdir(parents=True)
        answer = {"question": "Q?", "image": "none.jpg", "answers": ["yes", "ja"], "category": "", "counted": True}
        same = [{**answer, "id": f"same{i}", "prediction": "no", "score": 0.3} for i in range(40)]
        lines = [*same, {**answer, "id": "differs", "prediction": name, "score": score}]
        (place / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        result = {
            "benchmark": "vqav2",
            "protocol": "mobilevlm",
            "score": 31.0,
            "unit": "percent",
            "folder": str(tmp_path / "no"),
        }
        (place / "result.json").write_text(json.dumps(result))
        runs.append(folder)
    page, figures = page_of(tmp_path, *runs, samples=0, shown_answers=4)
    assert figures["predictions"]["vqav2"]["a"] == {"answers": 41, "score": "31.00 % (mobilevlm)"}
    assert "expected: yes, ja a: a (wrong) b: b (right)" in page.text
    assert "worth 0.30" in page.text
    assert "is not there" in page.text  # the benchmark's folder, and so its pictures


def test_pictures_of_answers_cannot_lead_out_of_their_folder(tmp_path):
    folder = write_run(tmp_path / "run", [log_line(1)], images=str(IMAGES))
    (folder / "test").mkdir()
    line = {
        "id": "x",
        "question": "Q",
        "image": "../student/config.json",
        "prediction": "p",
        "reference": "r",
        "correct": False,
    }
    (folder / "test" / "predictions.jsonl").write_text(json.dumps(line) + "\n")
    page, _ = page_of(tmp_path, folder, samples=0)
    assert "lies outside the image folder" in page.text


def test_the_best_student_and_an_early_end_are_in_the_overview(tmp_path):
    out = write_run(
        tmp_path / "run", [log_line(8)], result={"best": {"name": "agreement", "value": 0.5, "step": 8}, "ended_early": True}
    )
    page, _ = page_of(tmp_path, out, samples=0)
    assert "agreement 0.5, at step 8, then the run ended early" in page.text
