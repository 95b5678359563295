from __future__ import annotations

import shutil

import pytest
from tiny_runs import SAMPLES, STUDENT, TEACHER, copy_checkpoint, train, write_cache, write_data
from warm_door import WarmDoor

from alignkd.models.loading import load_vlm


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
