"""Images that the model will hardly see anything in: counted, and said in a warning."""

import logging
from dataclasses import dataclass, field

_log = logging.getLogger(__name__)


@dataclass
class DoubtfulImages:
    """Images of one value, or cut to fewer bits, by their places, each counted once in a process."""

    found: set[str] = field(default_factory=set)

    def add(self, place: str, why: str) -> None:
        """Count an image. The first is said, and then each power of ten."""
        if place in self.found:
            return
        self.found.add(place)
        count = len(self.found)
        if count == 10 ** (len(str(count)) - 1):
            _log.warning(
                "images that show little or nothing so far: %s; the last one is %s: %s. They are used as the model's own code"
                " reads them; if that is not meant, convert the files to 8-bit RGB without transparency",
                *(f"{count:,}", place, why),
            )
