from __future__ import annotations

import json
import shutil

import pytest
from tiny_runs import SAMPLES, STUDENT, TEACHER, copy_checkpoint, train, write_cache, write_data
from warm_door import WarmDoor

from alignkd.models.loading import load_vlm
from alignkd.pipeline.training.deepspeed_configs import read_deepspeed_config


@pytest.fixture(scope="session")
def teacher_vlm():
    return load_vlm(TEACHER)


@pytest.fixture(scope="session")
def student_vlm():
    return load_vlm(STUDENT)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Six samples: four golden ones, one without an image, one with two."""
    return write_data(tmp_path_factory.mktemp("data") / "samples.json", SAMPLES)


@pytest.fixture(scope="session")
def cache(tmp_path_factory, data):
    """A complete cache of three shards; the teacher that wrote it is gone."""
    folder = tmp_path_factory.mktemp("cache")
    teacher = copy_checkpoint(TEACHER, folder / "teacher")
    write_cache(data, folder / "cache", teacher=str(teacher))
    shutil.rmtree(teacher)
    return folder / "cache"


@pytest.fixture(scope="session")
def run(tmp_path_factory, data, cache):
    """An uninterrupted run of twelve steps, without a teacher on disk."""
    out = tmp_path_factory.mktemp("run") / "out"
    train(data, cache, out)
    return out


@pytest.fixture(scope="session")
def door(tmp_path_factory):
    """The real entry point in real processes; see warm_door.py."""
    warm = WarmDoor(tmp_path_factory.mktemp("door"))
    yield warm
    warm.close()


@pytest.fixture
def sharding(request, tmp_path):
    """The options for a way of sharing the work; of ZeRO-3 one that really splits parameters as small as these."""
    if request.param == "ddp":
        return []
    if request.param != "zero3":
        return ["--deepspeed", request.param]
    shipped = read_deepspeed_config("zero3")
    shipped["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "zero3.json").write_text(json.dumps(shipped))
    return ["--deepspeed", tmp_path / "zero3.json"]
