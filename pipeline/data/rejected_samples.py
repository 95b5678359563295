"""Rejected samples are counted, named and capped: a bad image folder must not become a small data set in silence."""

from dataclasses import dataclass, field


class TooManyRejectedError(ValueError):
    """More samples were rejected than ``--max-rejected`` allows."""


@dataclass
class RejectedSamples:
    """The rejected samples of a job, by id."""

    limit: int
    reasons: dict[str, str] = field(default_factory=dict)
    count: int = 0
    _seen: set[str] = field(default_factory=set)

    def add(self, sample_id: str, reason: str, *, key: str | None = None) -> None:
        """Note one; a sample of a ``key`` that was noted before (in an earlier epoch) is not counted again.

        Raises:
            TooManyRejectedError: the limit is passed; names the first few.
        """
        if key is not None:
            if key in self._seen:
                return
            self._seen.add(key)
        self.count += 1
        self.reasons.setdefault(sample_id, reason)
        if self.count > self.limit:
            first = "; ".join(f"{name}: {why}" for name, why in list(self.reasons.items())[:3])
            raise TooManyRejectedError(
                f"{self.count} samples cannot be used, more than --max-rejected {self.limit} allows. First: {first}."
                " Check --images and the data, or raise --max-rejected"
            )
