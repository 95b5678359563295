"""``kill -9`` at random instants: nothing is missing, doubled or damaged, and the content is that of an undisturbed run."""

from __future__ import annotations

import random

import pytest
from crashes import Crashes, crash_run
from tiny_runs import content, numbered, write_cache, write_data

pytestmark = [pytest.mark.slow, pytest.mark.processes]

CHANCE = random.Random(7)
FEW = [
    (place, Crashes(shard_format, steal, [4, CHANCE.randint(1, 2)], [CHANCE.random()], seconds=3.0))
    for shard_format, place, steal in (
        ("zarr", "local", True),
        ("webdataset", "local", False),
        ("zarr", "s3", False),
        ("webdataset", "s3", True),
    )
]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("many") / "data.json", numbered(8))


@pytest.fixture(scope="module")
def expected(many, tmp_path_factory):
    cache = tmp_path_factory.mktemp("expected") / "cache"
    write_cache(many, cache)
    return content(cache)


@pytest.mark.parametrize(("place", "crashes"), FEW, ids=lambda value: getattr(value, "shard_format", value))
def test_killed_workers_leave_a_cache_that_others_complete(door, tmp_path, many, expected, request, place, crashes):
    """``benchmarks/damage/crash_runs.py`` does this a hundred times, with up to three kills."""
    cache = request.getfixturevalue("s3_url") if place == "s3" else str(tmp_path / "cache")
    outcome = crash_run(door, many, cache, crashes)
    assert outcome.sound, outcome
    assert outcome.content_sha256 == expected
