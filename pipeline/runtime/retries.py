"""Try again, with growing pauses, what failed for the surroundings' sake and not for the input's."""

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from alignkd.errors import TransientError, is_transient

ATTEMPTS = 5
FIRST_PAUSE_S = 0.2
"""Seconds before the second attempt; each later pause is three times as long: about 8 seconds in all."""

Result = TypeVar("Result")

_log = logging.getLogger(__name__)


def with_retries(
    call: Callable[[], Result], what: str, *, attempts: int = ATTEMPTS, sleep: Callable[[float], None] = time.sleep
) -> Result:
    """The result of ``call``; ``what`` names it in the log. Errors that are not transient pass at once.

    Raises:
        TransientError: every attempt failed (:func:`alignkd.errors.is_transient`); the message holds the last cause.
    """
    for attempt in range(1, attempts + 1):
        try:
            return call()
        except Exception as error:
            if not is_transient(error):
                raise
            if attempt == attempts:
                raise TransientError(
                    f"{what} failed {attempts} times, the last time with: {error}. When it can be read again, run the same"
                    " command again (distill: with --resume)"
                ) from error
            _log.warning("%s failed and is tried again (%d of %d): %s", what, attempt + 1, attempts, error)
            # Workers that lost the same server should not come back to it at the same instant.
            sleep(FIRST_PAUSE_S * 3 ** (attempt - 1) * random.uniform(0.75, 1.25))
    raise AssertionError("the last attempt returns or raises")
