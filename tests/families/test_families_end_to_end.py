"""A teacher of every family is cached, a student of it distilled, saved and loaded."""

from __future__ import annotations

import json
import math

import pytest
from checkpoints import FAMILIES
from conversations import suiting

from alignkd.cache_store.protocol.maintenance.verify import verify
from alignkd.losses.recipes import get_recipe
from alignkd.models.loading import load_vlm
from alignkd.pipeline.config.cache_teacher import CacheTeacherConfig
from alignkd.pipeline.config.distill import DistillConfig
from alignkd.pipeline.stage_one.worker import cache_teacher
from alignkd.pipeline.training.run import distill


def write_data(name, folder):
    """The conversations that suit a family, as a LLaVA file with images beside it."""
    records = []
    for conversation in suiting(FAMILIES[name]):
        files = []
        for i, image in enumerate(conversation.images):
            files.append(f"{conversation.name}{i}.png")
            image.save(folder / files[-1])
        shown = {} if not files else {"image": files if len(files) > 1 else files[0]}
        turns = [{"from": speaker, "value": text} for speaker, text in conversation.turns]
        records.append({"id": conversation.name, **shown, "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    return str(folder / "data.json"), len(records)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_teacher_is_cached_and_a_student_distilled_from_it(name, written, tmp_path):
    data, samples = write_data(name, tmp_path)
    cached = cache_teacher(
        CacheTeacherConfig(
            teacher=str(written(name, 0)),
            data=data,
            images=str(tmp_path),
            cache=str(tmp_path / "cache"),
            shard_samples=4,
            device="cpu",
            max_rejected=0,
        )
    )
    assert cached["new_samples"] == samples
    assert verify(tmp_path / "cache").problems == []

    config = DistillConfig(
        student=str(written(name, 1)),
        data=data,
        images=str(tmp_path),
        out=str(tmp_path / "out"),
        recipe=get_recipe("align-kd"),
        cache=str(tmp_path / "cache"),
        max_steps=3,
        batch_size=samples,
        learning_rate=1e-2,
        warmup=0.0,
        log_steps=1,
        workers=0,
        device="cpu",
        report_to=(),
        max_rejected=0,
    )
    figures = distill(config)
    assert figures["rejected"] == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["samples"] for line in lines] == [samples, 2 * samples, 3 * samples]
    assert all(math.isfinite(line["loss"]) and line["attention"] > 0 and line["vision_all"] > 0 for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]

    student = load_vlm(tmp_path / "out" / "student")
    assert student.weights_fingerprint() != load_vlm(written(name, 1)).weights_fingerprint()
