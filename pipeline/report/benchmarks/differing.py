"""Questions that one of two models answers better than the other, with the pictures they are about."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from alignkd.errors import AlignkdError
from alignkd.models.encoders.image_files import open_image, read_pixels
from alignkd.pipeline.evaluate.benchmarks.registry import open_benchmark
from alignkd.pipeline.report.benchmarks.comparison import Comparison, shared_lines
from alignkd.pipeline.report.benchmarks.out_folders import Line, Result
from alignkd.pipeline.report.page import Html, thumbnail

MOST_SHOWN = 240
"""Questions on a page, all lists together: about 2 MB of pictures."""
_MOST_IN_A_LIST = 8
_PIXELS = 160


@dataclass(frozen=True)
class Differing:
    """Shared questions of one benchmark on which two models differ.

    ``first_better``, ``second_better``: all of them are counted, some are shown, as pairs of lines.
    """

    benchmark: str
    title: str
    first: str
    second: str
    counts: tuple[int, int]
    first_better: tuple[tuple[Line, Line], ...]
    second_better: tuple[tuple[Line, Line], ...]
    result: Result


def differing_questions(comparison: Comparison) -> list[Differing]:
    """For each pair of models and each benchmark they share, the questions on which they differ."""
    models = {model.name: model for model in comparison.models}
    jobs = [(pair, one.benchmark) for pair in comparison.pairs for one in pair.compared]
    most = max(1, min(_MOST_IN_A_LIST, MOST_SHOWN // max(1, 2 * len(jobs))))
    found = []
    for pair, name in jobs:
        one, other = models[pair.first].results[name], models[pair.second].results[name]
        lines = list(zip(*shared_lines(one, other), strict=True))
        first = [(a, b) for a, b in lines if a.counted and a.score > b.score]
        second = [(a, b) for a, b in lines if b.counted and b.score > a.score]
        counts = len(first), len(second)
        found.append(Differing(name, one.title, pair.first, pair.second, counts, _some(first, most), _some(second, most), one))
    return found


def _some(lines: Sequence[tuple[Line, Line]], most: int) -> tuple[tuple[Line, Line], ...]:
    """Lines spread evenly over all, so that they are of all categories."""
    if len(lines) <= most:
        return tuple(lines)
    return tuple(lines[place * len(lines) // most] for place in range(most))


class Pictures:
    """Pictures of benchmarks' data folders; each is read once. ``problems``: why some cannot be shown, by folder."""

    def __init__(self) -> None:
        self.problems: dict[str, str] = {}
        self._readers: dict[tuple[str, str], Callable[[str], bytes] | None] = {}
        self._shown: dict[tuple[str, str, str], Html | None] = {}

    def of(self, result: Result, reference: str) -> Html | None:
        """A small picture, or None where it cannot be read."""
        key = result.benchmark, result.folder, reference
        if key not in self._shown:
            self._shown[key] = self._read(result, reference)
        return self._shown[key]

    def _read(self, result: Result, reference: str) -> Html | None:
        try:
            if (read := self._reader(result)) is None:
                return None
            picture = read_pixels(open_image(io.BytesIO(read(reference)), reference), reference)
            return thumbnail(picture, reference, most=_PIXELS)
        except (AlignkdError, OSError, ValueError) as error:
            self.problems.setdefault(result.folder, str(error))
            return None

    def _reader(self, result: Result) -> Callable[[str], bytes] | None:
        place = result.benchmark, result.folder
        if place not in self._readers:
            self._readers[place] = None
            if not Path(result.folder).is_dir():
                self.problems[result.folder] = f"{result.folder} is not a folder on this machine"
                return None
            self._readers[place] = open_benchmark(result.benchmark, result.folder, result.protocol).read_image
        return self._readers[place]
