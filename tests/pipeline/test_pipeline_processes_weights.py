"""Learned weights and other layers on two processes: the same as on one with twice the batch."""

from __future__ import annotations

import pytest
from jobs import distill_arguments, run_job
from tiny_runs import metrics, train, write_cache

pytestmark = [pytest.mark.slow, pytest.mark.processes]

TERMS = ("loss", "supervised", "reverse_kl", "attention", "vision_all", "vision_focus")


@pytest.mark.parametrize("sharding", ["ddp", "zero3"], indirect=True)
def test_two_processes_learn_weights_and_layers_as_one_does(door, monkeypatch, data, tmp_path, sharding):
    write_cache(data, tmp_path / "cache", attention_layers="all@2")
    overrides = {"weighting_learning_rate": "0.1", "attention_layers": "all", "attention_distance": "cosine"}
    settings = {"epochs": 3.0, "batch_size": 4, "projector_learning_rate": 3e-3}
    train(data, tmp_path / "cache", tmp_path / "alone", recipe="beta-kd", overrides=overrides, **settings)
    more = ["--recipe", "beta-kd", *(word for pair in overrides.items() for word in ("--set", "=".join(pair)))]
    finished = run_job(door, monkeypatch, *distill_arguments(data, tmp_path / "cache", tmp_path / "out", *more, *sharding))
    assert [one.code for one in finished] == [0, 0], finished[0].stderr
    for line, wanted in zip(metrics(tmp_path / "out"), metrics(tmp_path / "alone"), strict=True):
        for name in (*TERMS, *(f"precision/{term}" for term in TERMS[1:])):
            assert line[name] == pytest.approx(wanted[name], rel=1e-3, abs=1e-6), (line["step"], name)
    assert len({line["precision/attention"] for line in metrics(tmp_path / "out")}) > 3
