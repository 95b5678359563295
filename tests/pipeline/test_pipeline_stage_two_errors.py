"""Whatever a user gives to stage two that cannot be used: one message of ours, never what a library raises."""

from __future__ import annotations

import json
import logging
import shutil
import sys

import pytest
from test_pipeline_distill_resume import sigterm_at
from tiny_runs import STUDENT, train

from alignkd.errors import AlignkdError, CheckpointError, ConfigError
from alignkd.pipeline.runtime.signals import Interrupted
from alignkd.pipeline.training import resume_checks

OPTIONS = {
    "a DeepSpeed stage that is no number": (
        {"deepspeed": '{"zero_optimization": {"stage": "two"}}', "term_gradients": True},
        "zero_optimization is {'stage': 'two'}, expected an object whose 'stage' is 0, 1, 2 or 3",
    ),
    "another optimizer under DeepSpeed": ({"deepspeed": "{}", "optimizer": "muon"}, "--optimizer muon does not run under"),
    "a tracker nobody knows": ({"report_to": ("scrolls",)}, "--report-to scrolls: transformers knows no tracker of this name"),
    "a tracker that is not installed": ({"report_to": ("wandb",)}, "--report-to wandb needs the package wandb"),
    "an unknown device": ({"device": "gpu"}, "--device gpu cannot be used here"),
    "a teacher's dtype without a teacher": ({"teacher_dtype": "float16"}, "--online-teacher, which is not given"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_cannot_be_used_are_refused_before_anything_is_written(data, cache, tmp_path, name):
    options, words = OPTIONS[name]
    if options.get("deepspeed", "").startswith("{"):
        (tmp_path / "own.json").write_text(options["deepspeed"])
        options = {**options, "deepspeed": str(tmp_path / "own.json")}
    with pytest.raises(AlignkdError, match=words):
        train(data, cache, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_a_launchers_variable_that_is_no_number_is_named(data, cache, tmp_path, monkeypatch, name):
    for variable, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", name: "abc"}.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=f"{name}='abc' in the environment"):
        train(data, cache, tmp_path / "out")


def test_processes_that_cannot_find_each_other_are_told_which_variable_is_missing(data, cache, tmp_path, monkeypatch):
    for variable, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConfigError, match=r"not where they meet: export MASTER_ADDR"):
        train(data, cache, tmp_path / "out")


@pytest.mark.parametrize(
    ("package", "options", "extra"),
    [("peft", {"lora": True}, "lora"), ("deepspeed", {"deepspeed": "zero2"}, "deepspeed")],
)
def test_a_package_that_is_missing_is_named_with_its_extra(data, cache, tmp_path, monkeypatch, package, options, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"--{extra} needs .*pip install 'alignkd\[{extra}\]'"):
        train(data, cache, tmp_path / "out", **options)


def test_easy_vqa_that_is_missing_is_named_with_its_extra(monkeypatch):
    from alignkd.pipeline.data.easy_vqa import load_easy_vqa

    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(ConfigError, match=r"pip install 'alignkd\[demo\]'"):
        load_easy_vqa()


# --- what a resumed run finds ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped_run(data, cache, tmp_path_factory):
    """A run that was stopped after its second step, of which tests damage copies."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    with pytest.MonkeyPatch.context() as patch:
        sigterm_at(2, patch)
        with pytest.raises(Interrupted, match="stopped by SIGTERM at step 2; continue with --resume"):
            train(data, cache, out)
    return out


@pytest.fixture
def stopped(stopped_run, data, cache, tmp_path):
    """A copy of the stopped run, and how to resume it."""
    shutil.copytree(stopped_run, tmp_path / "out")
    return tmp_path / "out", lambda: train(data, cache, tmp_path / "out", resume=True)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"configuration": 3}', '{"started": 1}', "[" * 100_000])
def test_a_damaged_record_of_the_run_is_named_with_the_way_out(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"run.json is damaged.*restore the file, or choose another --out"):
        resume_checks.check_same_run(tmp_path / "run.json", {"seed": 1})


def test_a_damaged_log_is_named(stopped):
    out, resume = stopped
    (out / "metrics.jsonl").write_text("{not a line}\n")
    with pytest.raises(CheckpointError, match=r"metrics.jsonl is damaged: remove it, or the lines that are not JSON"):
        resume()


@pytest.mark.parametrize("state", [[], {"processes": "two"}])
def test_a_run_whose_only_checkpoint_has_a_record_without_sense_is_not_begun_again_in_silence(stopped, state):
    out, resume = stopped
    path = out / "checkpoints" / "checkpoint-2" / "complete.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "state": state}))
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole: .*complete\.json .*begin again in another --out"):
        resume()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth"])
def test_a_damaged_file_of_a_checkpoint_is_named_with_the_way_out(stopped, name):
    out, resume = stopped
    folder = out / "checkpoints" / "checkpoint-2"
    (folder / name).write_bytes(b"\xff" * (folder / name).stat().st_size)  # of the size that the record tells
    with pytest.raises(
        CheckpointError, match=rf"is whole: {folder} is damaged: {name} .*SHA-256\. Restore one from a copy, or"
    ):
        resume()


def test_another_student_than_the_checkpoints_is_refused(stopped, data, cache):
    out, _ = stopped
    run = json.loads((out / "run.json").read_text())
    run["configuration"]["student"] = "another"
    (out / "run.json").write_text(json.dumps(run))
    with pytest.raises(ConfigError, match=f"was run with other settings: student: 'another' before, '{STUDENT}' now"):
        train(data, cache, out, resume=True)


@pytest.mark.slow
def test_checkpoints_and_resume_points_are_logged(stopped, caplog):
    out, resume = stopped
    with caplog.at_level(logging.INFO, logger="alignkd"):
        resume()
    assert f"resume point found: {out / 'checkpoints' / 'checkpoint-2'}" in caplog.messages
    assert any(message.startswith("checkpoint written: ") for message in caplog.messages)
