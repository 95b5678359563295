"""The rejected samples of all workers, from the commit records: each record is read once by each worker."""

import shlex
from dataclasses import dataclass, field

from alignkd.cache_store.protocol.commit import read_records
from alignkd.cache_store.protocol.manifest import NAME as MANIFEST
from alignkd.cache_store.protocol.names import committed_numbers
from alignkd.cache_store.protocol.store import CacheStore, open_store
from alignkd.cache_store.rows.reasons import NOT_FINITE
from alignkd.cache_store.storage import open_storage
from alignkd.pipeline.config.cache_teacher import CacheTeacherConfig
from alignkd.pipeline.data.rejected_samples import RejectedSamples
from alignkd.pipeline.stage_one import finite
from alignkd.pipeline.stage_one.checks.place import check_room_to_continue


@dataclass
class CommittedRejections:
    """What the shards that are committed rejected; shards that are to be tried again count when they were."""

    store: CacheStore
    config: CacheTeacherConfig
    rejects: RejectedSamples = field(init=False)
    _read: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.rejects = RejectedSamples(self.config.max_rejected, self.store.plan.samples)

    def check(self) -> None:
        """Read the records that are there by now, and stop where too many samples are rejected, or all.

        Raises:
            TooManyRejectedError: more than ``--max-rejected`` allows; what is rejected is recorded.
            NoUsableSampleError: the cache is complete, and holds no sample.
        """
        pending = self.store.retrying()
        planned = [n for n in committed_numbers(self.store.storage) if n < self.store.plan.shards]
        numbers = [n for n in planned if n not in self._read and n not in pending]
        for number, record in read_records(self.store.storage, numbers).items():
            self._read.add(number)
            for sample in record.rejected:
                self.rejects.note(sample.sample_id or sample.key, sample.reason, key=sample.key)
        self._advise()
        self.rejects.check()

    def _advise(self) -> None:
        """What to do depends on what most samples were rejected for."""
        most = next(iter(self.rejects.by_class.most_common(1)), ("", 0))[0]
        if most == NOT_FINITE:
            self.rejects.advice = finite.advice(self.config.dtype)
        else:
            again = f"alignkd cache repair {shlex.quote(self.store.url)} --retry-rejected"
            self.rejects.then = f". To try the rejected samples again, run this before cache-teacher: {again}"


def check_existing(config: CacheTeacherConfig) -> None:
    """Refuse, before the teacher is loaded, to continue a cache that has no room left, or too many rejected samples.

    Raises:
        ConfigError: no room.
        TooManyRejectedError, NoUsableSampleError: as :meth:`CommittedRejections.check`.
    """
    if open_storage(config.cache).size(MANIFEST) is not None:
        store = open_store(config.cache)
        CommittedRejections(store, config).check()
        check_room_to_continue(store)
