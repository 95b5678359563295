"""Rejected samples are counted, named and limited, so that a wrong image folder does not silently shrink the data set."""

import logging
from dataclasses import dataclass, field

from alignkd.errors import DataError

_logger = logging.getLogger(__name__)


class TooManyRejectedError(DataError):
    """More samples were rejected than ``--max-rejected`` allows."""


@dataclass
class RejectedSamples:
    """The rejected samples of a job, by id."""

    limit: int
    reasons: dict[str, str] = field(default_factory=dict)
    count: int = 0
    _seen: set[str] = field(default_factory=set)

    def add(self, sample_id: str, reason: str, *, key: str | None = None) -> None:
        """Count a sample; with a ``key`` only once, as it comes again in every epoch.

        Raises:
            TooManyRejectedError: more than the limit; names the first few.
        """
        if key is not None:
            if key in self._seen:
                return
            self._seen.add(key)
        self.count += 1
        self.reasons.setdefault(sample_id, reason)
        _logger.info("sample rejected: %s: %s", sample_id, reason)
        if self.count > self.limit:
            first = "; ".join(f"{name}: {why}" for name, why in list(self.reasons.items())[:3])
            raise TooManyRejectedError(
                f"{self.count} samples cannot be used, more than --max-rejected {self.limit} allows. First: {first}."
                " Check --images and the data, or raise --max-rejected"
            )
