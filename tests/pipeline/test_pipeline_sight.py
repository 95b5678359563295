"""A teacher that does not look at its images is warned about before its cache is written; one that looks is not."""

from __future__ import annotations

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_runs import SAMPLES, TEACHER, TEXT_ONLY, content, record, run_record, write_cache, write_data
from tiny_runs import train as train_student

from alignkd.cache_store.storage import open_storage
from alignkd.cli import main
from alignkd.pipeline.cache_admin.sight import recorded_sight, sight_words
from alignkd.pipeline.config.targets import TargetSettings
from alignkd.pipeline.stage_one import worker
from alignkd.pipeline.stage_one.checks import sight as module

ATTENTION = TargetSettings(targets=("attention",))
WARNING = "the teacher does not look at its images"


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    """Twenty-four pictures of upright or level stripes: at a tenth of the size all of them are grey."""
    root = tmp_path_factory.mktemp("stripes")
    records, generator = [], np.random.default_rng(0)
    for i in range(24):
        wave = np.where((np.arange(48) + int(generator.integers(6))) % 6 < 3, 40, 215)
        level = np.broadcast_to(wave[:, None], (48, 48))
        pixels = (level if i % 2 else level.T)[:, :, None] + generator.integers(-20, 20, 3)
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"{i}.png")
        records.append(record(f"s{i}", f"{i}.png", "<image>\nWhich way?", ("up", "flat")[i % 2]))
    write_data(root / "data.json", records)
    return root


@pytest.fixture(scope="module")
def seeing(stripes, tmp_path_factory):
    """The golden teacher after a few seconds of fine-tuning on the stripes."""
    out = tmp_path_factory.mktemp("seeing") / "out"
    settings = {"student": str(TEACHER), "images": str(stripes), "recipe": "sft", "max_steps": 20, "batch_size": 8}
    train_student(stripes / "data.json", None, out, **settings, learning_rate=3e-3, projector_learning_rate=1e-2)
    return out / "student"


def looked(stripes, cache, caplog, **changes):
    """The figures of a cache that is written, and whether there was a warning."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "alignkd"):
        write_cache(stripes / "data.json", cache, images=str(stripes), settings=ATTENTION, shard_samples=12, **changes)
    return run_record(cache)["sight"], [r.getMessage() for r in caplog.records if WARNING in r.getMessage()]


def test_a_teacher_that_looks_is_not_warned_about(stripes, seeing, tmp_path, caplog):
    sight, warnings = looked(stripes, tmp_path / "cache", caplog, teacher=str(seeing))
    assert not warnings
    assert (sight["blind"], sight["samples"]) == (False, 24)
    assert sight["gain"] - sight["standard_error"] > 2 * sight["threshold"]
    assert any("sight an image adds" in message for message in caplog.messages)


@pytest.mark.parametrize("how", ["the tower is noise", "pixel values are zero"])
def test_a_blind_teacher_is_warned_about_with_its_figures_and_what_to_do(stripes, seeing, tmp_path, caplog, how):
    teacher = tmp_path / "teacher"
    shutil.copytree(seeing, teacher)
    if how == "pixel values are zero":
        path = teacher / "preprocessor_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "rescale_factor": 1e-30}))
    else:
        state, generator = load_file(teacher / "model.safetensors"), torch.Generator().manual_seed(0)
        towers = [name for name in state if "vision_tower" in name]
        assert towers
        save_file(
            state | {name: torch.randn(state[name].shape, generator=generator) * 0.05 for name in towers},
            teacher / "model.safetensors",
            {"format": "pt"},
        )
    sight, warnings = looked(stripes, tmp_path / "cache", caplog, teacher=str(teacher))
    assert sight["blind"] is True
    assert len(warnings) == 1
    for word in ("0.03", "median advantage", "alignkd show", "vision tower", "preprocessor_config"):
        assert word in warnings[0]
    assert f"{sight['gain']:.4f} nats" in warnings[0]


@pytest.mark.slow
def test_the_look_changes_no_row_and_a_resumed_run_repeats_the_warning(stripes, tmp_path, caplog, monkeypatch):
    sight, warnings = looked(stripes, tmp_path / "cache", caplog)
    assert sight["blind"] is True
    looks = []
    monkeypatch.setattr(module, "look", lambda stage: looks.append(stage))
    with caplog.at_level(logging.WARNING, "alignkd"):
        caplog.clear()
        write_cache(stripes / "data.json", tmp_path / "cache", images=str(stripes), settings=ATTENTION, shard_samples=12)
    assert not looks
    assert [m for m in caplog.messages if WARNING in m] == warnings
    monkeypatch.setattr(worker, "check_sight", lambda stage, store: None)
    write_cache(stripes / "data.json", tmp_path / "other", images=str(stripes), settings=ATTENTION, shard_samples=12)
    assert content(tmp_path / "other") == content(tmp_path / "cache")


@pytest.mark.slow
def test_status_and_a_dry_run_say_what_was_seen(stripes, tmp_path, caplog):
    sight, _ = looked(stripes, tmp_path / "cache", caplog)
    shown = CliRunner().invoke(main, ["cache", "status", str(tmp_path / "cache"), "--json"])
    assert json.loads(shown.stdout)["sight"] == sight
    words = CliRunner().invoke(main, ["cache", "status", str(tmp_path / "cache")]).stdout
    assert "it does not look at its images" in " ".join(words.split())
    arguments = ["cache-teacher", "--teacher", TEACHER, "--data", stripes / "data.json", "--images", stripes, "--dry-run"]
    estimated = CliRunner().invoke(main, [str(a) for a in [*arguments, "--cache", tmp_path / "none", "--json"]])
    assert json.loads(estimated.stdout)["sight"] == sight
    assert not (tmp_path / "none").exists()


def test_a_few_samples_decide_nothing_and_text_alone_is_not_looked_at(tmp_path, caplog):
    write_cache(write_data(tmp_path / "few.json", SAMPLES), tmp_path / "few", settings=ATTENTION)
    sight = run_record(tmp_path / "few")["sight"]
    assert (sight["samples"], sight["blind"]) == (5, None)
    assert "too few" in sight_words(sight)
    texts = [{**TEXT_ONLY, "id": f"t{i}"} for i in range(9)]
    write_cache(write_data(tmp_path / "text.json", texts), tmp_path / "text", settings=ATTENTION)
    assert "sight" not in run_record(tmp_path / "text")
    assert WARNING not in caplog.text


def test_figures_that_another_program_wrote_are_left_out(tmp_path):
    good = {"samples": 9, "tokens": 9, "gain": 1, "standard_error": 0.1, "median_advantage": 0, "threshold": 0.02}
    good |= {"blind": False}
    for number, found in enumerate([{**good, "gain": "1"}, {**good, "gain": float("nan")}, {**good, "blind": "no"}, [], 3]):
        (tmp_path / f"{number}" / "runs").mkdir(parents=True)
        (tmp_path / f"{number}" / "runs" / "00.json").write_text(json.dumps({"sight": found}))
        assert recorded_sight(open_storage(str(tmp_path / f"{number}"))) is None
    (tmp_path / "0" / "runs" / "11.json").write_text(json.dumps({"sight": {**good, "more": "\x1b[2J"}}))
    assert recorded_sight(open_storage(str(tmp_path / "0"))) == good
