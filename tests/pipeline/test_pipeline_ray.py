"""``--engine ray``: who gets which shard when actors are lost, and a real local cluster of which one is killed."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import signal
import sys
from contextlib import suppress
from types import SimpleNamespace

import psutil
import pytest
from tiny_runs import IMAGES, TEACHER, content, numbered, stage_one_config, wait_until, write_cache, write_data

from alignkd.errors import AlignkdError, CacheError, ConfigError, TransientError
from alignkd.pipeline.data.rejected_samples import TooManyRejectedError
from alignkd.pipeline.runtime.signals import Interrupted, StopFlag
from alignkd.pipeline.stage_one import ray_workers as ray_engine
from alignkd.pipeline.stage_one.ray_workers import ShardCounts, _error_in_actor, _Shards, _wait, cache_teacher_on_ray

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


class ActorLostError(Exception):
    pass


class FakeActor:
    """Answers at once; a shard in ``kills`` takes the actor down, as often as it is in there."""

    def __init__(self, kills=(), rejects=0, *, returns=True, pending=(0, 1, 2)):
        self.kills, self.rejects, self.returns = list(kills), rejects, returns
        self.done, self.asked = [], 0
        self.run = SimpleNamespace(remote=lambda shard: (self._run, shard))
        self.pending = SimpleNamespace(remote=lambda: (self._pending, pending), options=lambda **_: self.pending)

    def _run(self, shard):
        if shard in self.kills:
            self.kills.remove(shard)
            raise ActorLostError(f"killed by shard {shard}")
        self.done.append(shard)
        return ShardCounts(self.rejects, truncated=1)

    def _pending(self, pending):
        self.asked += 1
        if not self.returns:
            raise ActorLostError("gone for good")
        return list(pending)


class FakeRay:
    exceptions = SimpleNamespace(RayActorError=ActorLostError)

    def wait(self, refs, timeout):
        assert refs, "nothing is under way, and shards are left"
        return refs[:1], refs[1:]

    def get(self, ref):
        call, argument = ref
        return call(argument)


@pytest.fixture
def shards(tmp_path, data):
    """Hands out a cache's shards to fake actors; two of its six samples were rejected before."""

    def make(*actors, pending=range(9), max_rejected=100):
        config = stage_one_config(data, tmp_path / "cache", max_rejected=max_rejected)
        ray_engine_open = SimpleNamespace(
            status=lambda: SimpleNamespace(rejected=("a", "b")), plan=SimpleNamespace(samples=1000)
        )
        patch.setattr(ray_engine, "open_store", lambda url: ray_engine_open)
        return _Shards(FakeRay(), actors, config, StopFlag(), list(pending))

    with pytest.MonkeyPatch.context() as patch:
        yield make


def test_every_shard_is_done_once(shards):
    actors = [FakeActor() for _ in range(4)]
    job = shards(*actors)
    job.run()
    assert sorted(shard for actor in actors for shard in actor.done) == list(range(9))
    assert job.truncated == 9


def test_the_shard_of_a_lost_actor_is_done_by_another_and_the_actor_works_again_when_it_lives_again(shards):
    first, second = FakeActor(kills=[0]), FakeActor()
    job = shards(first, second)
    job.run()
    assert sorted(first.done + second.done) == list(range(9))
    assert (first.asked, job.losses) == (1, 1)
    assert first.done


def test_the_last_shard_of_a_lost_actor_goes_to_an_actor_that_has_nothing_to_do(shards):
    idle, lost = FakeActor(), FakeActor(kills=[1], returns=False)
    job = shards(idle, lost, pending=[0, 1])
    job._give(idle), job._give(lost)
    for ref in list(job.running):
        job._finish(ref, SimpleNamespace(advance=lambda: None))
    assert [shard for _, shard in job.running.values()] == [None, 1]


def test_one_actor_alone_goes_on_after_each_loss(shards):
    alone = FakeActor(kills=[3, 3, 5])
    job = shards(alone)
    job.run()
    assert sorted(alone.done) == list(range(9))
    assert job.losses == 3


def test_a_shard_that_kills_every_actor_ends_the_job(shards):
    actors = [FakeActor(kills=[2] * 1000) for _ in range(2)]
    with pytest.raises(TransientError, match="101 times a Ray actor was lost; the last time: killed by shard 2"):
        shards(*actors).run()
    assert sorted(shard for actor in actors for shard in actor.done) == [0, 1, 3, 4, 5, 6, 7, 8]


def test_an_actor_that_never_comes_back_ends_the_job(shards):
    with pytest.raises(TransientError, match="a Ray actor was lost; the last time: gone for good"):
        shards(FakeActor(kills=[0], returns=False)).run()


def test_rejected_samples_of_all_actors_and_of_earlier_runs_count_together(shards):
    shards(FakeActor(rejects=2), FakeActor(rejects=2), max_rejected=20).run()
    with pytest.raises(TooManyRejectedError, match="20 samples cannot be used, more than --max-rejected 19 allows"):
        shards(FakeActor(rejects=2), FakeActor(rejects=2), max_rejected=19).run()


def test_a_signal_ends_the_job_before_the_next_answer(shards):
    job = shards(FakeActor())
    job.stop.signal_name = "SIGTERM"
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        job.run()


def test_the_first_actor_that_is_ready_says_what_is_to_do():
    actors = [FakeActor(returns=False), FakeActor(pending=[4, 7]), FakeActor(pending=[])]
    assert _wait(FakeRay(), actors, StopFlag()) == [4, 7]


def test_actors_that_are_all_lost_before_they_are_ready_are_one_message():
    with pytest.raises(TransientError, match="every Ray actor was lost while it loaded the teacher; the last one: gone"):
        _wait(FakeRay(), [FakeActor(returns=False) for _ in range(2)], StopFlag())


class FailedTaskError(Exception):
    """As Ray reports an error of an actor: with its cause, as far as it can be pickled, and the text of its traceback."""

    def __init__(self, cause):
        super().__init__(f"Traceback of the actor: {cause}")
        self.cause = pickle.loads(pickle.dumps(cause))


@pytest.mark.parametrize("cause", [CacheError("other settings"), AlignkdError("no data"), OSError(28, "disk full")])
def test_a_users_error_in_an_actor_is_raised_as_if_it_had_happened_here(cause):
    raised = _error_in_actor(FailedTaskError(cause))
    assert (type(raised), str(raised)) == (type(cause), str(cause))


@pytest.mark.parametrize("cause", [ValueError("a bug"), KeyError("a bug"), RuntimeError("a bug"), None])
def test_any_other_error_in_an_actor_keeps_its_traceback(cause):
    raised = _error_in_actor(FailedTaskError(cause))
    assert (type(raised), str(raised)) == (RuntimeError, f"Traceback of the actor: {cause}")


def test_a_cluster_that_does_not_answer_is_one_message(tmp_path, data, monkeypatch):
    def init(address, **options):
        raise ConnectionError("nobody there")

    fake = SimpleNamespace(init=init, shutdown=lambda: None, exceptions=SimpleNamespace(RayTaskError=FailedTaskError))
    monkeypatch.setitem(sys.modules, "ray", fake)
    with pytest.raises(ConfigError, match=r"--ray-address far:6379 cannot be used \(ConnectionError: nobody there\)"):
        cache_teacher_on_ray(stage_one_config(data, tmp_path / "cache"), workers=1, address="far:6379")


def test_without_ray_the_message_says_how_to_install_it(tmp_path, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"--engine ray needs the package ray; install it with: pip install 'alignkd\[ray\]'"):
        cache_teacher_on_ray(stage_one_config(data, tmp_path / "cache"), workers=1, address=None)


def start(door, data, cache):
    given = {"--teacher": TEACHER, "--data": data, "--images": IMAGES, "--cache": cache, "--device": "cpu"}
    given |= {"--shard-samples": 1, "--engine": "ray", "--ray-workers": 2}
    return door.start("cache-teacher", "--json", *(word for pair in given.items() for word in pair))


AT_WORK = ("ray::ShardActor.pending", "ray::ShardActor.run")


def processes(running):
    return psutil.Process(running.pid).children(recursive=True)


def named(running, name):
    """Processes of a cluster whose title begins so."""
    found = []
    for process in processes(running):
        with suppress(psutil.Error):
            words = process.cmdline()
            found += [process] if words and words[0].startswith(name) else []
    return found


@pytest.mark.slow
@pytest.mark.processes
@needs_ray
def test_a_cluster_of_which_an_actor_is_killed_writes_the_same_cache(door, tmp_path):
    data = write_data(tmp_path / "data.json", numbered(12))
    running = start(door, data, tmp_path / "cache")
    at_work = []
    wait_until(lambda: at_work.extend(named(running, AT_WORK)) or at_work, seconds=200)
    held, everyone = at_work[0], processes(running)
    # Held still, it keeps the shard that is in its hand, or that it will be given next.
    held.suspend()
    wait_until(lambda: list((tmp_path / "cache").glob("commits/0*.json")), seconds=200)
    held.kill()
    finished = running.finish()
    assert finished.code == 0, finished.stderr
    figures = json.loads(finished.stdout)
    assert (figures["engine"], figures["actors"], figures["new_shards"], figures["complete"]) == ("ray", 2, 12, True)
    assert figures["actors_lost"] == 1
    assert "engine ray, 2 actors" in finished.stderr
    assert "goes back into the queue" in finished.stderr
    write_cache(data, tmp_path / "undisturbed", shard_samples=1)
    assert content(tmp_path / "cache") == content(tmp_path / "undisturbed")
    assert psutil.wait_procs(everyone, timeout=100)[1] == []


@pytest.mark.slow
@pytest.mark.processes
@needs_ray
@pytest.mark.parametrize("moment", ["it starts", "it works"])
def test_a_signal_ends_a_cluster_with_exit_code_75(door, tmp_path, moment):
    running = start(door, write_data(tmp_path / "data.json", numbered(60)), tmp_path / "cache")
    begun = {
        "it starts": lambda: named(running, "ray::"),
        # Ray's core has connected by then, and has put its own handler of SIGTERM below Python's.
        "it works": lambda: list((tmp_path / "cache").glob("commits/0*.json")),
    }[moment]
    wait_until(begun, seconds=200)
    everyone = processes(running)
    os.kill(running.pid, signal.SIGTERM)
    finished = running.finish()
    assert finished.code == 75, finished.stderr
    assert "stopped by SIGTERM; run the same command again to continue" in finished.stderr
    assert psutil.wait_procs(everyone, timeout=100)[1] == []
