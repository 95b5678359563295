"""Stage one: run the teacher once and write its targets.

1. Index the data file, and give every sample its key.
2. Load the teacher. Everything that determines the targets becomes the cache's fingerprint.
3. Freeze the plan, or refuse a cache that was written with other settings.
4. For each of this worker's shards without a commit record: group its samples into batches under a token budget, run them,
   and commit the shard as a whole.

Threads read images ahead of the forward pass, and encode, compress and write rows behind it.
"""

import logging
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from alignkd.cache_store.protocol.maintenance.repair import MIN_AGE_S
from alignkd.cache_store.protocol.store import CacheStore, open_store
from alignkd.cache_store.rows.encode import EncodedRow, encode_row
from alignkd.cache_store.rows.row import Rejected
from alignkd.errors import TransientError
from alignkd.pipeline.cache_admin.sight import SIGHT
from alignkd.pipeline.cache_admin.status import status_figures
from alignkd.pipeline.config.cache_teacher import CacheTeacherConfig
from alignkd.pipeline.runtime.devices import device_words, peak_memory_bytes
from alignkd.pipeline.runtime.logs import log_start
from alignkd.pipeline.runtime.out_of_memory import out_of_memory_is_transient
from alignkd.pipeline.runtime.progress import ProgressBar, progress_bar
from alignkd.pipeline.runtime.ranks import Worker, find_worker
from alignkd.pipeline.runtime.run_record import make_run_record
from alignkd.pipeline.runtime.signals import StopFlag, stop_on_signals
from alignkd.pipeline.stage_one.checks.rejections import CommittedRejections
from alignkd.pipeline.stage_one.checks.sight import check_sight, sight_of_start
from alignkd.pipeline.stage_one.dry_run import check_room_for_plan
from alignkd.pipeline.stage_one.halve_on_oom import HalvingRunner
from alignkd.pipeline.stage_one.heartbeat import heartbeat
from alignkd.pipeline.stage_one.prefetch import HostThreads
from alignkd.pipeline.stage_one.run_teacher import TeacherOutput
from alignkd.pipeline.stage_one.shard_work import ReadyBatch, ShardWork, not_finite, rows
from alignkd.pipeline.stage_one.teacher_stage import StageOne
from alignkd.plugins import load_plugins

_BATCHES_AHEAD = 3

_log = logging.getLogger(__name__)


def cache_teacher(config: CacheTeacherConfig) -> dict[str, Any]:
    """Write or continue a cache, as one of any number of workers; figures of this run and of the whole cache.

    Raises:
        AlignkdError: bad input, a cache of other settings, or too many rejected samples.
        TransientError: the surroundings fail, memory included, or shards of this worker are left: run it again.
        Interrupted: a signal came; what is committed stays.
    """
    load_plugins(config.plugins)
    worker = find_worker(config.rank, config.world_size)
    with stop_on_signals() as stop, heartbeat(config.cache, worker) as beat:
        stage = StageOne.open(config, worker.local_rank, stop)
        store = stage.open_store(lambda: beat.enter("calibrating"), partial(check_room_for_plan, stage))
        store.sweep(min_age_s=MIN_AGE_S)
        configuration = asdict(stage.config) | {"template": stage.template, "worker": str(worker)}
        sight = check_sight(stage, store)
        store.write_run(make_run_record(config.job, configuration) | ({} if sight is None else {SIGHT: sight}))
        log_stage_one(stage, store, worker, sight)
        started = time.perf_counter()
        job = WorkerJob(stage, store, worker, stop)
        beat.enter("writing", lambda: job.samples)
        with out_of_memory_is_transient():
            job.run(worker.order(stage.todo(store.pending()), steal=config.steal))
        check_done(store, worker, stage.todo(store.pending()), steal=config.steal)
    seconds = time.perf_counter() - started
    warn_of_truncated(job.truncated, config.max_length)
    return {
        "worker": str(worker),
        "new_samples": job.samples,
        "truncated_samples": job.truncated,
        "new_samples_per_second": round(job.samples / seconds, 3),
        "new_positions_per_second": round(job.tokens / seconds, 1),
        "run_seconds": round(seconds, 3),
        "peak_memory_bytes": peak_memory_bytes(),
        **status_figures(open_store(config.cache)),
    }


def check_done(store: CacheStore, worker: Worker, pending: Sequence[int] | None = None, *, steal: bool) -> None:
    """A worker that ends well leaves no shard that is its to write; one alone, or with ``steal``, leaves none at all.

    ``pending``: the shards that are not committed and that this run can make, all of those by default.

    Raises:
        TransientError: another process removed or marked some of them meanwhile.
    """
    if left := worker.order(store.pending() if pending is None else pending, steal=steal):
        raise TransientError(
            f"{len(left)} of {store.plan.shards} shards are not committed, though this worker wrote its shards: a repair ran"
            " meanwhile. Run the same command again"
        )
    if others := store.pending():
        _log.info("%d shards of other workers, or of other data, are not committed yet", len(others))


def log_stage_one(stage: StageOne, store: CacheStore, worker: Worker, sight: dict[str, Any] | None) -> None:
    """The line of the log that says what starts."""
    config, plan = stage.config, stage.plan
    done = plan.shards - len(store.pending())
    log_start(
        config.job,
        rank=str(worker),
        device=device_words(str(stage.teacher.device)),
        teacher=config.teacher,
        data=f"{config.data_words} ({plan.samples:,} samples)",
        datasets=stage.samples.datasets or None,
        images=config.images_words,
        cache=f"{config.cache} ({config.shard_format})",
        plan=f"{plan.shards:,} shards of up to {config.shard_samples:,} samples, {done:,} of them done",
        targets="+".join(config.settings.targets),
        template=stage.template,
        sight=sight_of_start(sight),
    )


def warn_of_truncated(samples: int, max_length: int) -> None:
    """Log that samples of this run were cut at the maximum length, if any were."""
    if samples:
        _log.warning(
            "%d samples were truncated to --max-length %d token ids: the end of their text has no targets. Raise --max-length"
            " (for a new cache), or shorten the data",
            samples,
            max_length,
        )


@dataclass
class WorkerJob:
    """One worker's shards. Counts of this run: ``samples`` with a row, those of them ``truncated``, positions, bytes."""

    stage: StageOne
    store: CacheStore
    worker: Worker
    stop: StopFlag
    samples: int = 0
    rejected: int = 0
    truncated: int = 0
    tokens: int = 0
    bytes: int = 0
    committed: CommittedRejections = field(init=False)
    runner: HalvingRunner = field(init=False)

    def __post_init__(self) -> None:
        self.committed = CommittedRejections(self.store, self.stage.config)
        self.runner = HalvingRunner(self.stage)

    def run(self, shards: Sequence[int], *, show: bool = True) -> None:
        """Write these shards; those that another worker commits in the meantime are skipped.

        Raises:
            Interrupted: a signal came.
            TooManyRejectedError: more samples are rejected than ``--max-rejected`` allows, those of all workers together; the
                shard that passed the limit is committed, so that every rejection is recorded.
            NoUsableSampleError: the cache is complete, and every sample was rejected.
        """
        self.committed.check()
        total = sum(len(self.store.plan.positions_of(shard)) for shard in shards)
        job = self.stage.config.job
        title = job if self.worker.world_size == 1 else f"{job} {self.worker}"
        self.stop.check()
        _log.info("worker %s starts: %d shards, %d samples", self.worker, len(shards), total)
        with HostThreads(self.stage.config.host_threads) as host, progress_bar(title, total, "samples", show=show) as progress:
            for work in host.prefetch(shards, self.stage.batch_shard, 1):
                if self.store.committed(work.number):
                    progress.advance(len(self.store.plan.positions_of(work.number)))
                    continue
                self._run_shard(work, host, progress)
            host.flush()
        self.committed.check()
        _log.info("worker %s ends: %d samples, %d rejected", self.worker, self.samples, self.rejected)

    def _run_shard(self, work: ShardWork, host: HostThreads, progress: ProgressBar) -> None:
        started = time.perf_counter()
        encoded: list[EncodedRow] = []
        rejected = list(work.rejected)
        self._reject(work.rejected)
        progress.advance(len(work.rejected))
        tokens = rejected_for_memory = 0
        for ready in host.prefetch(work.batches, self.stage.load, _BATCHES_AHEAD):
            self.stop.check()
            outputs, too_large = self.runner.run(ready)
            rejected_for_memory += len(too_large)
            self._reject([*ready.rejected, *too_large])
            rejected += [*ready.rejected, *too_large]
            host.write_behind(partial(self._encode, outputs, encoded, rejected))
            positions = sum(planned.length for planned, _ in ready.samples)
            tokens += positions
            self.tokens += positions
            self.truncated += sum(part.truncated for part, _ in outputs)
            progress.advance(len(ready.samples) + len(ready.rejected))
            progress.note(self._note(progress))
        if rejected_for_memory and not self.runner.fitted:
            raise TransientError(
                f"memory ran out for each of the first {rejected_for_memory} samples: another process holds it, or the device"
                " is too small for this teacher. Run the same command again when it is free, or with a smaller --dtype"
            )
        host.write_behind(lambda: self._commit(work.number, encoded, rejected, time.perf_counter() - started, tokens))

    def _encode(
        self, outputs: Sequence[tuple[ReadyBatch, TeacherOutput]], encoded: list[EncodedRow], rejected: list[Rejected]
    ) -> None:
        """Encode the rows of a batch behind the forward pass; only here is it known which of them are finite."""
        for ready, output in outputs:
            made, broken = [encode_row(self.store.spec, row) for row in rows(ready, output)], not_finite(ready, output)
            encoded += made
            rejected += broken
            self.samples += len(made)
            self._reject(broken)

    def _commit(
        self, number: int, encoded: Sequence[EncodedRow], rejected: Sequence[Rejected], seconds: float, tokens: int
    ) -> None:
        worker = f"{self.worker} {platform.node()} {os.getpid()}"
        record = self.store.commit_shard(number, encoded, rejected, seconds=seconds, tokens=tokens, worker=worker)
        self.bytes += record.bytes
        _log.info(
            "shard %d is committed: %d rows, %d rejected, %d bytes, %.1f s",
            *(number, record.rows, len(record.rejected), record.bytes, seconds),
        )
        self.committed.check()

    def _reject(self, rejected: Sequence[Rejected]) -> None:
        for sample in rejected:
            _log.info("sample %s is rejected: %s", sample.sample_id or sample.key, sample.reason)
        self.rejected += len(rejected)

    def _note(self, progress: ProgressBar) -> str:
        parts = [f"{self.tokens / max(progress.seconds, 1e-9):,.0f} positions/s", f"{self.bytes / 1e6:,.1f} MB written"]
        counts = {"rejected": self.rejected, "truncated": self.truncated}
        return ", ".join(parts + [f"{count} {name}" for name, count in counts.items() if count])
