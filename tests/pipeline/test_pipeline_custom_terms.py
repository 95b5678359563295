"""Runs of stage two with a loss term from outside the package."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import metrics, student_sha256, train, without_time
from torch import nn

from alignkd.losses import term_registry
from alignkd.losses.custom_terms import register_term
from alignkd.losses.recipes import get_recipe
from alignkd.pipeline.runtime.signals import Interrupted
from alignkd.pipeline.training.callbacks import RunCallback
from alignkd.pipeline.training.monitoring.health_checks import HealthChecks


@pytest.fixture(autouse=True)
def _lifted(monkeypatch):
    monkeypatch.setattr(term_registry, "_TERMS", {})

    @register_term("lifted", needs=("vision",), averaged_over="samples")
    class Lifted(nn.Module):
        def __init__(self, shapes):
            super().__init__()
            self.map = nn.Linear(shapes.student_width, shapes.teacher.width)

        def forward(self, inputs):
            error = self.map(inputs.student_vision_BVD) - inputs.targets.vision_BVD
            return error.square().sum(dim=2).sum(dim=1)


def stop_at(step, monkeypatch):
    real = RunCallback.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, args, state, control, **kwargs)

    monkeypatch.setattr(RunCallback, "on_step_end", on_step_end)


@pytest.mark.slow
def test_a_run_with_a_term_of_its_own_trains_it_and_resumes_to_the_same_bits(data, cache, tmp_path, monkeypatch):
    settings = {"recipe": "align-kd", "overrides": {"lifted": "0.1", "vision": "0"}, "term_gradients": True}
    whole, out = tmp_path / "whole", tmp_path / "out"
    train(data, cache, whole, save_steps=12, **settings)
    with monkeypatch.context() as patch:
        stop_at(5, patch)
        with pytest.raises(Interrupted):
            train(data, cache, out, **settings)
    (checkpoint,) = (out / "checkpoints").glob("checkpoint-*")
    before = load_file(checkpoint / "model.safetensors")["extra_terms.term_lifted.map.weight"]
    train(data, cache, out, resume=True, **settings)
    assert student_sha256(out) == student_sha256(whole)
    assert without_time(metrics(out)) == without_time(metrics(whole))
    after = load_file(whole / "checkpoints" / "checkpoint-12" / "model.safetensors")["extra_terms.term_lifted.map.weight"]
    assert not torch.equal(before, after)
    line = metrics(whole)[-1]
    assert line["weighted/lifted"] == pytest.approx(0.1 * line["lifted"])
    assert line["gradient_norm/lifted"] > 0
    assert json.loads((whole / "run.json").read_text())["configuration"]["recipe"]["extra"] == {"lifted": 0.1}
    with pytest.raises(ValueError, match="was run with other settings: recipe"):
        train(data, cache, out, resume=True, recipe="align-kd", overrides={"vision": "0"})


@pytest.mark.slow
def test_a_run_recorded_before_there_were_terms_from_outside_still_resumes(data, cache, tmp_path):
    train(data, cache, tmp_path, epochs=1.0)
    assert "extra" not in json.loads((tmp_path / "run.json").read_text())["configuration"]["recipe"]
    assert train(data, cache, tmp_path, epochs=1.0, resume=True)["steps"] == 3


def test_warnings_about_shares_know_the_term():
    watch = HealthChecks(get_recipe("sft", {"lifted": "0.5"}), lines=2)
    line = {"step": 1, "share/supervised": 0.999, "share/lifted": 0.001}
    assert watch(line) == []
    warnings = watch(line)
    assert any(text.startswith("lifted was below 1%") and "--set lifted=..., now 0.5" in text for text in warnings)
