"""What a release changed in the ids, labels or pixel values of samples: why a cache that was written before is refused.

A change of an encoder raises :data:`ENCODER_VERSION` by one, with an entry in :data:`CHANGES` that says whose samples it
concerns. A cache's fingerprint holds the last change that concerns its teacher (``encoder``; absent where none does), so
fingerprints of caches whose samples are as they were stay equal. This file imports neither torch nor transformers.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class EncoderChange:
    """``version`` began with it; ``reason``: what differs, as the end of "since then ..."; ``concerns(family, template)``."""

    version: int
    reason: str
    concerns: Callable[[str, str], bool]


CHANGES: tuple[EncoderChange, ...] = (
    EncoderChange(
        2,
        "an answer's white space is kept as it stands in the file (it was stripped before), and with a chat template an answer"
        " is what the template renders of it",
        lambda family, template: template not in ("v1", "plain"),
    ),
    EncoderChange(
        3,
        "images with transparency, an orientation or another mode than RGB are what the model's own processor makes of them",
        lambda family, template: family not in ("mobilevlm", "minigpt4"),
    ),
)

ENCODER_VERSION = CHANGES[-1].version
"""The version of this release."""


def encoder_version(family: str, template: str) -> int:
    """The last change that concerns a family's samples under a template; 1 where none does."""
    return max((change.version for change in CHANGES if change.concerns(family, template)), default=1)


def changes_since(version: int, family: str, template: str) -> list[str]:
    """The reasons of the changes after ``version`` that concern a family's samples under a template."""
    return [change.reason for change in CHANGES if change.version > version and change.concerns(family, template)]
