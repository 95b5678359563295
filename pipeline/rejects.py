"""Rejected samples are counted, named and capped: a bad image folder must not become a small data set in silence."""

from dataclasses import dataclass, field


class TooManyRejected(ValueError):  # noqa: N818 - the name says what is the matter
    """More samples were rejected than ``--max-rejected`` allows."""


@dataclass
class Rejects:
    """The rejected samples of a job, by id."""

    limit: int
    reasons: dict[str, str] = field(default_factory=dict)
    count: int = 0

    def add(self, sample_id: str, reason: str) -> None:
        """Note one.

        Raises:
            TooManyRejected: the limit is passed; names the first few.
        """
        self.count += 1
        self.reasons.setdefault(sample_id, reason)
        if self.count > self.limit:
            first = "; ".join(f"{name}: {why}" for name, why in list(self.reasons.items())[:3])
            raise TooManyRejected(
                f"{self.count} samples cannot be used, more than --max-rejected {self.limit} allows. First: {first}."
                " Check --images and the data, or raise --max-rejected"
            )
