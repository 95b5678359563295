"""How a run of stage two ends: last values, shares, warnings again, where things lie, and a command that runs."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image
from tiny_runs import IMAGES, STUDENT, metrics, record, stage_two_config, train, write_data

from alignkd.losses.recipes import get_recipe
from alignkd.pipeline.training.monitoring.health_checks import HealthChecks
from alignkd.pipeline.training.monitoring.summary import next_command, rejection_warnings, summary


@pytest.fixture(scope="module")
def ended(tmp_path_factory, data, cache):
    """A run whose last step is no step of a log line, and what it gave."""
    out = tmp_path_factory.mktemp("ended") / "out"
    return out, train(data, cache, out, log_steps=5, overrides={"attention": "1e-6"})


def test_the_last_step_has_a_line_and_the_result_its_terms(ended):
    out, figures = ended
    assert [line["step"] for line in metrics(out)] == [1, 5, 10, 12]
    last = metrics(out)[-1]
    assert figures["loss"] == pytest.approx(last["loss"])
    terms = figures["terms"]
    assert sum(term["share"] for term in terms.values()) == pytest.approx(1)
    assert sum(term["weighted"] for term in terms.values()) == pytest.approx(figures["loss"], rel=1e-4)
    assert {name: term["value"] for name, term in terms.items()} == pytest.approx({name: last[name] for name in terms})
    assert figures["samples_per_second"] == pytest.approx(figures["samples"] / figures["seconds"], rel=1e-2)
    assert json.loads((out / "result.json").read_text()) == figures


def test_everything_that_is_named_is_there(ended):
    out, figures = ended
    assert figures["out"] == str(out)
    assert {"student", "student-official", "metrics.jsonl", "run.json", "result.json"} <= figures["folders"].keys()
    assert all(list(out.glob(name)) for name in figures["folders"])


def test_a_run_too_short_for_a_warning_to_last_says_at_the_end_what_its_last_line_shows(ended):
    _, figures = ended
    (warning,) = [text for text in figures["warnings"] if text.startswith("attention was")]
    assert "below 1% of the loss in the last log line (now 0.00%, step 12): it has almost no effect" in warning


@pytest.mark.slow
@pytest.mark.processes
def test_the_summary_is_the_last_thing_on_the_console_and_its_command_runs(door, data, cache, tmp_path):
    out = tmp_path / "a run"
    arguments = ["distill", "--student", STUDENT, "--cache", cache, "--data", data, "--images", IMAGES, "--out", out]
    done = door(*arguments, "--max-steps", 2, "--batch-size", 2, "--set", "attention=1e-6", "--device", "cpu")
    assert done.code == 0, done.stderr
    assert "2 steps, 4 samples" in done.stdout
    assert all(term in done.stdout for term in ("supervised", "reverse_kl", "vision_all"))
    before, _, after = done.stdout.partition("warnings (")
    assert "at the end   share" in before
    assert "attention was below 1% of the loss" in after
    command = shlex.split(done.stdout.strip().splitlines()[-1])
    assert command[:2] == ["alignkd", "evaluate"]
    evaluated = door(*command[1:], "--max-new-tokens", 2, "--device", "cpu")
    assert evaluated.code == 0, evaluated.stderr
    assert (out / "evaluation" / "result.json").exists()


def test_reported_warnings_are_not_replaced_by_what_the_last_line_shows():
    checks = HealthChecks(get_recipe("align-kd"), lines=2)
    shares = dict.fromkeys(("supervised", "reverse_kl", "vision_all", "vision_focus"), 0.2)
    low = {"step": 7, "samples": 4, **{f"share/{name}": share for name, share in {**shares, "attention": 0.001}.items()}}
    assert checks(low) == []
    (told,) = checks(low)
    assert checks.closing({**low, "share/attention": 0.2}) == [told]
    assert checks.closing(low) == [told]
    again = HealthChecks(get_recipe("align-kd"))
    again.resume(checks.reported)
    assert again.closing({"step": 8}) == [told]
    for damaged in (None, [], "text", 3):
        again.resume(damaged)


def test_rejected_samples_are_one_warning_with_their_reasons_by_count():
    assert rejection_warnings(0, []) == []
    reasons = [*(f"image /data/{i}.png: No such file or directory" for i in range(40)), "its text is not Unicode: x"]
    (warning,) = rejection_warnings(41, reasons)
    assert warning.startswith("rejected and not learned: 41 samples (40 image missing, 1 text); ")
    assert "the first: image /data/0.png: No such file or directory. result.json names them" in warning
    assert "/data/1.png" not in warning


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_show_nothing_are_named_at_the_end_whoever_read_them(tmp_path, workers):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, colour in (("grey.png", (7, 7, 7)), ("none.png", (0, 0, 0))):
        Image.new("RGB", (64, 64), colour).save(folder / name)
    shutil.copy(IMAGES / "0.png", folder / "seen.png")
    names = ("grey.png", "seen.png", "none.png", "grey.png")
    records = [record(f"s{i}", name, "<image>\nWhat is it?", "This.") for i, name in enumerate(names)]
    data = write_data(tmp_path / "d.json", records)
    result = train(data, None, tmp_path / "out", recipe="sft", images=str(folder), epochs=1.0, workers=workers)
    (warning,) = result["warnings"]
    assert "images that show little or nothing: 2 of those that the first process read (grey.png, none.png)" in warning


def test_the_next_command_can_be_pasted_whatever_the_names_are(tmp_path):
    config = stage_two_config(Path("my data;x.json"), None, tmp_path / "it's", recipe="sft", plugins=("a b.py",))
    words = shlex.split(next_command(config, tmp_path / "it's" / "student"))
    assert words[words.index("--data") + 1] == "my data;x.json"
    assert words[words.index("--model") + 1] == str(tmp_path / "it's" / "student")
    assert words[words.index("--plugin") + 1] == "a b.py"


def test_a_run_without_terms_or_warnings_has_a_summary_all_the_same():
    figures = {"steps": 1, "samples": 2, "tokens": 300, "padding_share": 0.25, "processes": 2, "seconds": 3725.0}
    figures |= {"samples_per_second": 1.0, "tokens_per_second": 10.0, "peak_memory_bytes": 2e9, "terms": {}, "warnings": []}
    figures |= {"loss": None, "out": "run", "folders": {"student": "the student"}, "next": "alignkd evaluate"}
    text = summary(figures)
    assert "1 steps, 2 samples, 300 positions (25% padding) on 2 processes" in text
    assert "1 h 02 min: 1 samples/s, 10 positions/s; peak memory 2.00 GB" in text
    assert "warnings" not in text
