"""``--engine ray``: an elastic cluster hands out the shards to actors, each with a teacher.

A shard is one task. When an actor or its node is lost, Ray starts another actor where there is room, and the shard it was
working on goes back into the queue. What is committed stays, as with any other worker.
"""

import logging
import shlex
import sys
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from alignkd.cache_store.protocol.store import open_store
from alignkd.errors import AlignkdError, ConfigError, TransientError, wrap_errors
from alignkd.pipeline.cache_admin.status import status_figures
from alignkd.pipeline.config.cache_teacher import CacheTeacherConfig
from alignkd.pipeline.config.log import LogConfig
from alignkd.pipeline.data.rejected_samples import TooManyRejectedError, allowed_rejections
from alignkd.pipeline.runtime.logs import log_start, start_logging
from alignkd.pipeline.runtime.out_of_memory import out_of_memory_is_transient
from alignkd.pipeline.runtime.progress import ProgressBar, progress_bar
from alignkd.pipeline.runtime.ranks import Worker
from alignkd.pipeline.runtime.signals import StopFlag, stop_on_signals, take_back_signals
from alignkd.pipeline.stage_one.checks.rejections import CommittedRejections
from alignkd.pipeline.stage_one.checks.sight import check_sight
from alignkd.pipeline.stage_one.dry_run import check_room_for_plan
from alignkd.pipeline.stage_one.heartbeat import Heartbeat
from alignkd.pipeline.stage_one.teacher_stage import StageOne
from alignkd.pipeline.stage_one.worker import WorkerJob, check_done, log_stage_one, warn_of_truncated
from alignkd.plugins import load_plugins

_log = logging.getLogger(__name__)

_WAIT_S = 1.0
_MAX_LOSSES = 100


@dataclass(frozen=True)
class ShardCounts:
    """Samples of a finished shard that were rejected, and those with a row that were truncated."""

    rejected: int
    truncated: int


class ShardActor:
    """A teacher that does one shard after the other."""

    def __init__(self, config: CacheTeacherConfig) -> None:
        self.config = config

    @cached_property
    def job(self) -> WorkerJob:
        """Opened by the first task: Ray reports an error in ``__init__`` as a lost actor."""
        start_logging(LogConfig(), Worker())  # to the standard error of its process, of which Ray keeps a file on its node
        load_plugins(self.config.plugins)
        stage, beat = StageOne.open(self.config), Heartbeat(self.config.cache, Worker())
        store = stage.open_store(lambda: beat.enter("calibrating"), partial(check_room_for_plan, stage))
        # Every actor looks, since none of them leaves a record; a few seconds each, at the same time.
        log_stage_one(stage, store, Worker(), check_sight(stage, store))
        job = WorkerJob(stage, store, Worker(), StopFlag())
        beat.enter("writing", lambda: job.samples)
        return job

    def pending(self) -> list[int]:
        """Shards without a commit record. The answer also shows that this actor is ready."""
        return self.job.stage.todo(self.job.store.pending())

    def run(self, shard: int) -> ShardCounts:
        """Write a shard."""
        rejected, truncated = self.job.rejected, self.job.truncated
        with out_of_memory_is_transient():
            self.job.run([shard], show=False)
        return ShardCounts(self.job.rejected - rejected, self.job.truncated - truncated)


def cache_teacher_on_ray(config: CacheTeacherConfig, *, workers: int | None, address: str | None) -> dict[str, Any]:
    """Write or continue a cache on a Ray cluster; figures of this run and of the whole cache.

    Raises:
        AlignkdError: Ray is not installed or not there, bad input, a cache of other settings, too many rejected samples, or
            actors that are lost again and again.
        OSError: storage or files failed, here or in an actor.
        RuntimeError: another error in an actor, with the text of its traceback.
        Interrupted: a signal came; what is committed stays.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError("--engine ray needs the package ray; install it with: pip install 'alignkd[ray]'") from error
    started = time.perf_counter()
    # Ray reports lost actors on standard output, where the figures belong. In the main thread it would catch SIGTERM itself,
    # and the processes it starts end with the thread that started them.
    with redirect_stdout(sys.stderr), stop_on_signals() as stop, ThreadPoolExecutor(1) as thread:
        options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "include_dashboard": False}
        try:
            cluster = f"the Ray cluster of --ray-address {address}" if address else "a Ray cluster on this machine"
            with wrap_errors(ConfigError, f"{cluster} cannot be used", ValueError, RuntimeError, ConnectionError):
                thread.submit(ray.init, address=address, **options).result()
            take_back_signals()
            shards = _run(ray, config, workers, stop)
        except ray.exceptions.RayTaskError as error:
            raise _error_in_actor(error) from error
        finally:
            ray.shutdown()
    warn_of_truncated(shards.truncated, config.max_length)
    store = open_store(config.cache)
    CommittedRejections(store, config).check()
    check_done(store, Worker(), [shard for shard in store.pending() if shard in shards.planned], steal=False)
    return {
        "engine": "ray",
        "actors": len(shards.actors),
        "actors_lost": shards.losses,
        "new_shards": shards.total,
        "truncated_samples": shards.truncated,
        "run_seconds": round(time.perf_counter() - started, 3),
        **status_figures(store),
    }


def _run(ray: Any, config: CacheTeacherConfig, workers: int | None, stop: StopFlag) -> "_Shards":
    gpus = int(ray.cluster_resources().get("GPU", 0))
    remote = ray.remote(ShardActor).options(num_gpus=min(gpus, 1), num_cpus=1, max_restarts=_MAX_LOSSES)
    actors = [remote.remote(config) for _ in range(workers or max(gpus, 1))]
    pending = _wait(ray, actors, stop)
    log_start(
        config.job,
        engine=f"ray, {len(actors):,} actors",
        teacher=config.teacher,
        data=config.data_words,
        images=config.images_words,
        cache=f"{config.cache} ({config.shard_format})",
        plan=f"{len(pending):,} shards are left",
    )
    shards = _Shards(ray, actors, config, stop, pending)
    shards.run()
    return shards


def _wait(ray: Any, actors: Sequence[Any], stop: StopFlag) -> list[int]:
    """The pending shards, from the first actor that is ready."""
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
                    raise TransientError(
                        f"every Ray actor was lost while it loaded the teacher; the last one: {error}. Look for a lack of"
                        " memory on its node"
                    ) from error
            else:
                return pending


class _Shards:
    """The queue of shards, and which actor works on which of them."""

    def __init__(
        self, ray: Any, actors: Sequence[Any], config: CacheTeacherConfig, stop: StopFlag, pending: Sequence[int]
    ) -> None:
        self.ray, self.actors, self.config, self.stop = ray, actors, config, stop
        self.queue = deque(pending)
        self.left = set(pending)
        self.planned = frozenset(pending)
        self.total = len(pending)
        self.running: dict[Any, tuple[Any, int | None]] = {}
        self.losses = 0
        store = open_store(config.cache)
        self.rejected = len(store.status().rejected)
        self.allowed = allowed_rejections(config.max_rejected, store.plan.samples)
        self.truncated = 0

    def run(self) -> None:
        """Return when every shard is done."""
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
            self.rejected += result.rejected
            self.truncated += result.truncated
            if self.rejected > self.allowed:
                raise TooManyRejectedError(
                    f"{self.rejected} samples cannot be used, more than --max-rejected {self.config.max_rejected} allows."
                    " Check --images and the data, or raise --max-rejected. The reasons:"
                    f" alignkd cache status {shlex.quote(self.config.cache)}"
                )
        self._give(actor)

    def _lost(self, actor: Any, shard: int | None, error: Exception) -> None:
        self.losses += 1
        if self.losses > _MAX_LOSSES or shard is None:
            raise TransientError(
                f"{self.losses} times a Ray actor was lost; the last time: {error}. What is committed stays; run the same"
                " command again to continue"
            ) from error
        _log.warning("a Ray actor was lost; shard %d goes back into the queue: %s", shard, error)
        self.queue.append(shard)
        # Ray answers when the actor is restarted and has loaded its teacher; until then the others may take the shard.
        self.running[actor.pending.options(max_task_retries=-1).remote()] = (actor, None)
        busy = [running for running, _ in self.running.values()]
        for idle in [other for other in self.actors if other not in busy]:
            self._give(idle)


def _error_in_actor(error: Any) -> Exception:
    """What to raise here for an error in an actor: users' errors themselves, others with the text of their traceback."""
    cause = error.cause
    # Ray sends the exception itself where it can be pickled, and only its text where it cannot.
    return cause if isinstance(cause, AlignkdError | OSError) else RuntimeError(str(error))
