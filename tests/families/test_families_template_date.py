"""A template that writes the date has one date for the whole cache: its start's, for all workers and for stage two."""

from __future__ import annotations

import dataclasses
import json

import pytest
from test_families_end_to_end import write_data

from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.losses.recipes import get_recipe
from alignkd.models.encoders.templates import chat_template
from alignkd.pipeline.config.cache_teacher import CacheTeacherConfig
from alignkd.pipeline.config.distill import DistillConfig
from alignkd.pipeline.stage_one import teacher_stage
from alignkd.pipeline.stage_one.worker import cache_teacher
from alignkd.pipeline.training.run import distill


@pytest.fixture
def dated(written, tmp_path):
    """Teacher and student whose template begins with the date, with all that stage one is asked."""
    import make_qwen3_vl

    folders = []
    for seed in (0, 1):
        folder = tmp_path / f"model{seed}"
        make_qwen3_vl.write(folder, seed)
        path = folder / "chat_template.jinja"
        path.write_text("{{- strftime_now('%Y-%m-%d') -}}" + path.read_text())
        folders.append(str(folder))
    data, samples = write_data("qwen3_vl", tmp_path)
    config = CacheTeacherConfig(
        teacher=folders[0], data=data, images=str(tmp_path), cache=str(tmp_path / "cache"), shard_samples=1, device="cpu"
    )
    return config, folders[1], samples


class Clock(chat_template.datetime):
    day = 1

    @classmethod
    def now(cls, tz=None):
        return cls(2030, 1, cls.day)


@pytest.mark.slow
def test_workers_of_other_days_and_stage_two_go_on_with_the_date_of_the_caches_start(dated, tmp_path, monkeypatch):
    config, student, samples = dated
    monkeypatch.setattr(chat_template, "datetime", Clock)
    monkeypatch.setattr(Clock, "day", 1)
    cache_teacher(dataclasses.replace(config, rank=0, world_size=2, steal=False))
    monkeypatch.setattr(Clock, "day", 2)
    cached = cache_teacher(config)
    assert cached["samples_done"] == samples
    assert CacheReader(config.cache).fingerprint["prompt_date"] == "2030-01-01T00:00:00"
    monkeypatch.setattr(Clock, "day", 3)
    out = tmp_path / "out"
    figures = distill(
        DistillConfig(
            student=student,
            data=config.data,
            images=config.images,
            out=str(out),
            recipe=get_recipe("align-kd"),
            cache=config.cache,
            max_steps=1,
            batch_size=2,
            workers=0,
            device="cpu",
            report_to=(),
        )
    )
    assert figures["rejected"] == 0
    assert json.loads((out / "run.json").read_text())["configuration"]["prompt_date"] == "2030-01-01T00:00:00"


def test_a_worker_that_finds_no_cache_yet_takes_the_date_of_the_one_that_was_faster(dated, monkeypatch):
    config, _, _ = dated
    monkeypatch.setattr(chat_template, "datetime", Clock)
    cache_teacher(dataclasses.replace(config, rank=0, world_size=2, steal=False))
    monkeypatch.setattr(Clock, "day", 2)
    found, looked = teacher_stage.cached_prompt_date, []

    def late(cache):
        looked.append(cache)
        return None if len(looked) == 1 else found(cache)

    monkeypatch.setattr(teacher_stage, "cached_prompt_date", late)
    cache_teacher(config)
    assert len(looked) == 2
    assert CacheReader(config.cache).fingerprint["prompt_date"] == "2030-01-01T00:00:00"
