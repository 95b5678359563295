"""Every command through the installed entry point, on tiny models."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from reference.codec_errors import error_bound
from tiny_runs import (
    GOLDEN,
    GOLDEN_SAMPLES,
    IMAGES,
    SAMPLES,
    STUDENT,
    TEACHER,
    content,
    metrics,
    record,
    write_cache,
    write_data,
)

from tests.reference.logits import logprob_error

VALUES = dict(np.load(GOLDEN / "golden.npz"))
COMMANDS = [
    "",
    "cache-teacher",
    "cache",
    "cache status",
    "cache verify",
    "cache repair",
    "cache convert",
    "cache inspect",
    "distill",
    "show",
    "evaluate",
    "benchmark",
    "benchmark run",
    "benchmark score",
    "demo",
]
DATA = ["--images", IMAGES, "--device", "cpu"]


def ok(door, *arguments):
    finished = door(*arguments)
    assert finished.code == 0, finished.stderr
    assert "Traceback" not in finished.stderr
    return finished.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(door, command):
    words = ok(door, *command.split(), "--help")
    assert "Usage: " in words
    if command not in ("cache", "benchmark"):  # groups; their commands have theirs
        assert re.search(r"Example:\n\s+alignkd " + command, words)


def test_the_version_is_that_of_the_package(door):
    from alignkd import __version__

    assert __version__ in ok(door, "--version")


def test_stage_one_writes_the_cache_that_the_library_writes(door, tmp_path, data, cache):
    arguments = ["cache-teacher", "--teacher", TEACHER, "--data", data, "--cache", tmp_path / "cache", *DATA]
    figures = json.loads(ok(door, *arguments, "--shard-samples", 2, "--template", "v1", "--json"))
    assert (figures["new_samples"], figures["shards"], figures["complete"]) == (6, 3, True)
    assert content(tmp_path / "cache") == content(cache)


def test_a_dry_run_prints_figures_and_writes_nothing(door, tmp_path, data):
    arguments = ["cache-teacher", "--teacher", TEACHER, "--data", data, "--cache", tmp_path / "cache", *DATA]
    figures = json.loads(ok(door, *arguments, "--dry-run", "--json"))
    assert figures["samples"] == 6
    assert figures["bytes"] > 0
    assert list(tmp_path.iterdir()) == []


def test_status_shows_progress_sizes_and_rejected_samples(door, tmp_path):
    bad = record("bad", "none.png", "<image>\nWhat?", "This.")
    data = write_data(tmp_path / "d.json", [SAMPLES[0], bad, SAMPLES[1]])
    write_cache(data, tmp_path / "cache")
    (tmp_path / "cache" / "commits" / "000001.json").unlink()
    figures = json.loads(ok(door, "cache", "status", tmp_path / "cache", "--json"))
    assert (figures["shards_done"], figures["shards"], figures["complete"]) == (1, 2, False)
    assert (figures["samples_done"], figures["samples_rejected"], figures["samples"]) == (1, 1, 3)
    assert [entry["id"] for entry in figures["rejected"]] == ["bad"]
    assert "none.png" in figures["rejected"][0]["reason"]
    words = ok(door, "cache", "status", tmp_path / "cache")
    assert "incomplete" in words
    assert re.search(r"image missing +1 +bad: image ", words)


def test_verify_ends_with_the_content_digest(door, cache):
    words = ok(door, "cache", "verify", cache)
    assert words.splitlines()[-1] == f"content sha256: {content(cache)}"
    figures = json.loads(ok(door, "cache", "verify", cache, "--json"))
    assert (figures["rows"], figures["problems"], figures["content_sha256"]) == (6, [], content(cache))
    assert "not computed" in ok(door, "cache", "verify", cache, "--quick").splitlines()[-1]


def test_inspect_prints_specification_and_fingerprint(door, cache):
    specification = json.loads(ok(door, "cache", "inspect", cache))
    assert specification["fingerprint"]["template"] == "v1"
    assert {field["name"] for field in specification["fields"]} >= {"attention", "vision_tokens", "topk_rank_steps", "sketch"}
    assert json.loads(ok(door, "cache", "inspect", cache, "--json")) == specification


@pytest.mark.parametrize("model", ["teacher", "student"])
def test_show_gives_the_values_of_the_reference_model(door, tmp_path, model):
    for template in ("v1", "plain"):
        name = "cap0" if template == "plain" else "multi2"
        saved = tmp_path / f"{template}.npz"
        arguments = ["show", "--model", GOLDEN / model, "--data", GOLDEN / "samples.json", *DATA, "--id", name]
        figures = json.loads(ok(door, *arguments, "--template", template, "--save", saved, "--json"))
        arrays = dict(np.load(saved))
        expected = {"input_ids", "labels", "pixel_values", "attention_HTV", "vision_tokens_VD", "answer_logits_AN", "loss"}
        assert set(arrays) == expected
        for field in ("input_ids", "labels"):
            np.testing.assert_array_equal(arrays[field], VALUES[f"{template}/{name}/{field}"])
        np.testing.assert_allclose(arrays["pixel_values"][0], VALUES[f"pixel_values/{name}"], atol=1e-5)
        golden = {
            "attention_HTV": "attention_text_to_vision",
            "vision_tokens_VD": "vision_tokens",
            "answer_logits_AN": "answer_logits",
            "loss": "loss",
        }
        for field, key in golden.items():
            assert arrays[field].dtype == np.float32
            reference = VALUES[f"{template}/{name}/{model}/{key}"]
            atol = 1e-5 if field == "attention_HTV" else 1e-4 * max(np.abs(reference).max(), 1)
            np.testing.assert_allclose(arrays[field], reference, rtol=0, atol=atol)
        assert figures["loss"] == pytest.approx(float(arrays["loss"]))
        assert [t["id"] for t in figures["tokens"]] == arrays["input_ids"].tolist()
        supervised = [t["supervised"] for t in figures["tokens"]]
        assert supervised == [label != -100 for label in arrays["labels"].tolist()]


def test_show_and_inspect_save_arrays_that_agree(door, tmp_path, cache, data):
    shown, cached = tmp_path / "show.npz", tmp_path / "inspect.npz"
    for name in ("vqa1", "two5"):
        ok(door, "show", "--model", TEACHER, "--data", data, *DATA, "--id", name, "--save", shown)
        figures = json.loads(ok(door, "cache", "inspect", cache, "--id", name, "--save", cached, "--json"))
        a, b = dict(np.load(shown)), dict(np.load(cached))
        fields = {"input_ids", "labels", "attention_HTV", "vision_tokens_VD", "topk_ids_AK", "topk_logprobs_AK", "tail_mass_A"}
        assert set(b) == fields
        assert figures["shapes"] == {field: list(b[field].shape) for field in b}
        for field in ("input_ids", "labels"):
            np.testing.assert_array_equal(a[field], b[field])
        for field, codec in (("attention_HTV", "sqrt8"), ("vision_tokens_VD", "int8-rows")):
            assert b[field].dtype == np.float32
            assert (np.abs(a[field] - b[field]) <= error_bound(codec, a[field]) + 1e-5).all()
        logits = a["answer_logits_AN"].astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        kept = np.take_along_axis(logprobs, b["topk_ids_AK"], axis=1)
        assert (np.abs(b["topk_logprobs_AK"] - kept) <= 2 * logprob_error(torch.from_numpy(kept)).numpy() + 2e-3).all()
        np.testing.assert_allclose(b["tail_mass_A"], 1 - np.exp(kept).sum(axis=1), rtol=0.05, atol=1e-3)


@pytest.mark.slow
def test_plots_are_pictures(door, tmp_path, cache, data):
    ok(door, "show", "--model", STUDENT, "--data", data, *DATA, "--id", "two5", "--plot", tmp_path / "show.png")
    ok(door, "cache", "inspect", cache, "--id", "cap0", "--plot", tmp_path / "inspect.png")
    for name in ("show.png", "inspect.png"):
        with Image.open(tmp_path / name) as picture:
            picture.load()
            assert min(picture.size) > 100
            assert len(set(picture.convert("L").resize((64, 64)).tobytes())) > 10


def test_show_prints_a_table_of_tokens_for_a_sample_with_and_without_an_image(door, data):
    words = ok(door, "show", "--model", STUDENT, "--data", data, *DATA)
    assert "<image: 144 vision tokens>" in words
    for place in ("before image", "after image", "supervised"):
        assert place in words
    words = ok(door, "show", "--model", STUDENT, "--data", data, *DATA, "--id", "text4")
    assert re.search(r"vision tokens +0\n", words)


def test_distill_trains_as_the_library_does(door, tmp_path, data, cache, run):
    arguments = ["distill", "--student", STUDENT, "--cache", cache, "--data", data, *DATA, "--out", tmp_path / "out"]
    arguments += ["--batch-size", 2, "--learning-rate", "1e-3", "--epochs", 4, "--log-steps", 1, "--workers", 0]
    result = json.loads(ok(door, *arguments, "--json"))
    assert (result["steps"], result["samples"]) == (12, 24)
    assert [line["loss"] for line in metrics(tmp_path / "out")] == [line["loss"] for line in metrics(run)]


@pytest.mark.slow
def test_a_field_of_the_recipe_can_be_set_and_a_recipe_can_be_a_file(door, tmp_path, data, cache):
    arguments = ["distill", "--student", STUDENT, "--cache", cache, "--data", data, *DATA, "--max-steps", 1]
    ok(door, *arguments, "--out", tmp_path / "a", "--set", "attention=0.5", "--set", "focus_k=4")
    resolved = json.loads((tmp_path / "a" / "run.json").read_text())["configuration"]["recipe"]
    assert (resolved["attention"], resolved["focus_k"]) == (0.5, 4)
    (tmp_path / "mine.yaml").write_text("base: align-kd\nvision: 0.0\n")
    ok(door, *arguments, "--out", tmp_path / "b", "--recipe", tmp_path / "mine.yaml")
    assert not any("vision" in name for name in metrics(tmp_path / "b")[0])


def test_evaluate_gives_the_same_predictions_at_any_batch_size(door, tmp_path, data):
    predictions = []
    for size in (1, 4):
        out = tmp_path / str(size)
        arguments = ["evaluate", "--model", STUDENT, "--data", data, *DATA, "--max-new-tokens", 6, "--out", out]
        figures = json.loads(ok(door, *arguments, "--batch-size", size, "--json"))
        result = json.loads((out / "result.json").read_text())
        assert figures == result
        low, high = result["interval_95"]
        assert 0 <= low <= result["accuracy"] <= high <= 1
        assert result["answered"] == 6
        predictions.append([json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()])
    assert predictions[0] == predictions[1]
    assert [p["id"] for p in predictions[0]] == [r["id"] for r in SAMPLES]
    assert any(p["prediction"] for p in predictions[0])


def test_evaluate_counts_a_right_answer(door, tmp_path, data):
    arguments = ["evaluate", "--model", STUDENT, "--data", data, *DATA, "--max-new-tokens", 6, "--out", tmp_path / "first"]
    ok(door, *arguments)
    said = {}
    for line in (tmp_path / "first" / "predictions.jsonl").read_text().splitlines():
        said[json.loads(line)["id"]] = json.loads(line)["prediction"]
    records = json.loads(json.dumps(GOLDEN_SAMPLES[:2]))
    for entry in records:
        entry["conversations"][-1]["value"] = said[entry["id"]].upper() + "."
    records.append(GOLDEN_SAMPLES[3])
    right = write_data(tmp_path / "right.json", records)
    arguments[arguments.index(data)] = right
    result = json.loads(ok(door, *arguments[:-1], tmp_path / "second", "--json"))
    assert (result["correct"], result["answered"], result["accuracy"]) == (2, 3, pytest.approx(2 / 3))


def test_evaluate_names_what_it_could_not_answer(door, tmp_path):
    bad = record("bad", "none.png", "<image>\nWhat?", "This.")
    odd = record("odd", None, "half a pair: \ud800", "This.")
    data = write_data(tmp_path / "d.json", [SAMPLES[4], bad, odd])
    result = json.loads(ok(door, "evaluate", "--model", STUDENT, "--data", data, *DATA, "--max-new-tokens", 2, "--json"))
    assert (result["answered"], result["rejected"], set(result["rejected_samples"])) == (1, 2, {"bad", "odd"})


def test_a_copied_cache_is_the_same_cache(door, tmp_path, cache):
    shutil.copytree(cache, tmp_path / "copy")
    assert ok(door, "cache", "verify", tmp_path / "copy").splitlines()[-1].endswith(content(cache))
