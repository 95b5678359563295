"""Rejected samples are counted, named and limited, so that a wrong image folder does not silently shrink the data set."""

import logging
import math
from collections import Counter
from dataclasses import dataclass, field

from alignkd.cache_store.rows.reasons import in_words, reason_class
from alignkd.errors import DataError, SampleError
from alignkd.pipeline.data.sample import Sample

LEAST_ALLOWED = 10
"""A share of ``--max-rejected`` allows at least this many: one per cent of a few samples would be none."""

_logger = logging.getLogger(__name__)


class TooManyRejectedError(DataError):
    """More samples were rejected than ``--max-rejected`` allows."""


class NoUsableSampleError(DataError):
    """Every sample was rejected."""


def allowed_rejections(limit: int | str, samples: int) -> int:
    """How many of ``samples`` may be rejected: a number as it is, or a share such as ``1%``, but :data:`LEAST_ALLOWED`."""
    if isinstance(limit, int):
        return limit
    return max(LEAST_ALLOWED, math.floor(samples * float(limit.rstrip("%")) / 100))


@dataclass
class RejectedSamples:
    """The rejected samples of a job, by id.

    ``limit``: ``--max-rejected``. ``samples``: all samples of the job, those of other workers included. ``advice`` and ``then``
    end the messages.
    """

    limit: int | str
    samples: int
    reasons: dict[str, str] = field(default_factory=dict)
    count: int = 0
    advice: str = "Check --images and the data"
    then: str = ""
    by_class: Counter[str] = field(default_factory=Counter)
    _seen: set[str] = field(default_factory=set)

    def add(self, sample_id: str, reason: str, *, key: str | None = None) -> None:
        """Count a sample; with a ``key`` only once, as it comes again in every epoch.

        Raises:
            TooManyRejectedError, NoUsableSampleError: as :meth:`check`.
        """
        if self.note(sample_id, reason, key=key):
            _logger.info("sample rejected: %s: %s", sample_id, reason)
            self.check()

    def note(self, sample_id: str, reason: str, *, key: str | None = None) -> bool:
        """Count a sample as :meth:`add` does, without a limit; False if it was counted before."""
        if key is not None:
            if key in self._seen:
                return False
            self._seen.add(key)
        self.count += 1
        self.by_class[reason_class(reason)] += 1
        self.reasons.setdefault(sample_id, reason)
        return True

    def check(self) -> None:
        """Stop the job where too many samples are rejected. The messages have the reasons by count, and the first few samples.

        Raises:
            TooManyRejectedError: more than the limit.
            NoUsableSampleError: no sample is left.
        """
        allowed = allowed_rejections(self.limit, self.samples)
        if self.count > allowed:
            share = f" ({allowed:,} of {self.samples:,} samples)" if isinstance(self.limit, str) else ""
            raise TooManyRejectedError(
                f"{self.count:,} samples cannot be used, more than --max-rejected {self.limit}{share} allows: {self.summary()}."
                f" {self.advice}, or raise --max-rejected{self.then}"
            )
        if self.count and self.count >= self.samples:
            end = f"{self.advice}{self.then}"
            raise NoUsableSampleError(f"none of {self.samples:,} samples can be used: {self.summary()}. {end}")

    def summary(self) -> str:
        """The reasons by count, and the first few samples with theirs."""
        first = "; ".join(f"{name}: {why}" for name, why in list(self.reasons.items())[:3])
        return f"{in_words(dict(self.by_class.most_common()))}. First: {first}"


def check_text(sample: Sample) -> None:
    """Reject a sample whose record could not be read, and text that no tokenizer takes.

    Raises:
        SampleError: it has a fault; or it holds half of a surrogate pair, which JSON can escape but UTF-8 cannot encode.
    """
    if sample.fault:
        raise SampleError(sample.fault)
    try:
        for _, text in sample.turns:
            text.encode()
    except UnicodeEncodeError as error:
        raise SampleError(f"its text is not Unicode: {error}") from error
