"""``--engine ray``: an elastic cluster hands out the shards to actors, each with a teacher.

A shard is one task. When an actor or its node is lost, Ray starts another where there is room, and the shard in its hand
goes back into the queue; what was committed stays, as with any other worker.
"""

import sys
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from functools import cached_property
from typing import Any

from alignkd.cache_store.protocol.store import open_store
from alignkd.pipeline.cache_admin.status import status_figures
from alignkd.pipeline.config.cache_teacher import CacheTeacherConfig
from alignkd.pipeline.runtime.progress import ProgressBar, progress_bar
from alignkd.pipeline.runtime.ranks import Worker
from alignkd.pipeline.runtime.signals import StopFlag, stop_on_signals
from alignkd.pipeline.stage_one.teacher_stage import StageOne
from alignkd.pipeline.stage_one.worker import WorkerJob

_WAIT_S = 1.0
_MAX_LOSSES = 100


class ShardActor:
    """A teacher that does one shard after the other."""

    def __init__(self, config: CacheTeacherConfig) -> None:
        self.config = config

    @cached_property
    def job(self) -> WorkerJob:
        """Opened by the first task and not by ``__init__``, whose errors Ray reports as a lost actor."""
        stage = StageOne.open(self.config)
        return WorkerJob(stage, stage.open_store(), Worker(), StopFlag())

    def pending(self) -> list[int]:
        """Shards without a record; also tells that this actor is ready."""
        return self.job.store.pending()

    def run(self, shard: int) -> int:
        """Do a shard; how many of its samples were rejected."""
        before = self.job.rejects.count
        self.job.run([shard], show=False)
        return self.job.rejects.count - before


def cache_teacher_on_ray(config: CacheTeacherConfig, *, workers: int | None, address: str | None) -> dict[str, Any]:
    """Write (or go on with) a cache on a Ray cluster; figures of this run and of the whole cache.

    Raises:
        ValueError: Ray is not installed, bad input, a cache of other settings, too many rejected samples, or actors that
            are lost again and again.
        Interrupted: a signal came; what is committed stays.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError("--engine ray needs the package ray; install it with: pip install 'alignkd[ray]'") from error
    started = time.perf_counter()
    # Ray tells of lost actors on standard output, where the figures belong. In the main thread it would take SIGTERM for
    # itself, and what it starts ends with the thread that started it.
    with redirect_stdout(sys.stderr), stop_on_signals() as stop, ThreadPoolExecutor(1) as thread:
        options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "include_dashboard": False}
        try:
            thread.submit(ray.init, address=address, **options).result()
            shards = _run(ray, config, workers, stop)
        except ray.exceptions.RayTaskError as error:
            raise _user_error(error) from error
        finally:
            ray.shutdown()
    return {
        "engine": "ray",
        "actors": len(shards.actors),
        "actors_lost": shards.losses,
        "new_shards": shards.total,
        "run_seconds": round(time.perf_counter() - started, 3),
        **status_figures(open_store(config.cache)),
    }


def _run(ray: Any, config: CacheTeacherConfig, workers: int | None, stop: StopFlag) -> "_Shards":
    gpus = int(ray.cluster_resources().get("GPU", 0))
    remote = ray.remote(ShardActor).options(num_gpus=min(gpus, 1), num_cpus=1, max_restarts=_MAX_LOSSES)
    actors = [remote.remote(config) for _ in range(workers or max(gpus, 1))]
    shards = _Shards(ray, actors, config, stop, _wait(ray, actors, stop))
    shards.run()
    return shards


def _wait(ray: Any, actors: Sequence[Any], stop: StopFlag) -> list[int]:
    """What is to do, as the first actor that is ready says."""
    refs = [actor.pending.remote() for actor in actors]
    while True:
        stop.check()
        ready, _ = ray.wait(refs, timeout=_WAIT_S)
        for ref in ready:
            try:
                pending: list[int] = ray.get(ref)
            except ray.exceptions.RayActorError as error:
                refs.remove(ref)
                if not refs:
                    raise ValueError(f"every Ray actor was lost while it loaded the teacher; the last one: {error}") from error
            else:
                return pending


class _Shards:
    """The queue, and who does what of it."""

    def __init__(
        self, ray: Any, actors: Sequence[Any], config: CacheTeacherConfig, stop: StopFlag, pending: Sequence[int]
    ) -> None:
        self.ray, self.actors, self.config, self.stop = ray, actors, config, stop
        self.queue = deque(pending)
        self.left = set(pending)
        self.total = len(pending)
        self.running: dict[Any, tuple[Any, int | None]] = {}
        self.losses = 0
        self.rejected = len(open_store(config.cache).status().rejected)

    def run(self) -> None:
        """Until every shard is done."""
        with progress_bar("cache-teacher (ray)", len(self.left), "shards") as progress:
            for actor in self.actors:
                self._give(actor)
            while self.left:
                self.stop.check()
                done, _ = self.ray.wait(list(self.running), timeout=_WAIT_S)
                for ref in done:
                    self._finish(ref, progress)

    def _give(self, actor: Any) -> None:
        shard = self.queue.popleft() if self.queue else None
        if shard is not None:
            self.running[actor.run.remote(shard)] = (actor, shard)

    def _finish(self, ref: Any, progress: ProgressBar) -> None:
        actor, shard = self.running.pop(ref)
        try:
            result = self.ray.get(ref)
        except self.ray.exceptions.RayActorError as error:
            self._lost(actor, shard, error)
            return
        if shard is not None:
            self.left.discard(shard)
            progress.advance()
            self.rejected += result
            if self.rejected > self.config.max_rejected:
                raise ValueError(f"{self.rejected} samples cannot be used, more than --max-rejected allows")
        self._give(actor)

    def _lost(self, actor: Any, shard: int | None, error: Exception) -> None:
        self.losses += 1
        if self.losses > _MAX_LOSSES or shard is None:
            raise ValueError(f"{self.losses} times a Ray actor was lost; the last time: {error}") from error
        self.queue.append(shard)
        # Ray answers when the actor lives again and has its teacher; meanwhile the others have the shard.
        self.running[actor.pending.options(max_task_retries=-1).remote()] = (actor, None)
        idle = [other for other in self.actors if other not in [busy for busy, _ in self.running.values()]]
        for other in idle:
            self._give(other)


def _user_error(error: Any) -> Exception:
    """The error that happened in an actor, if it is the user's to mend."""
    cause = error.cause if isinstance(error.cause, Exception) else error
    return ValueError(str(cause)) if isinstance(cause, ValueError | KeyError | OSError) else RuntimeError(str(cause))
