"""What is refused before a model is loaded."""

from collections.abc import Sequence
from pathlib import Path

from alignkd.errors import DataError
from alignkd.pipeline.config.benchmark import BenchmarkRunConfig
from alignkd.pipeline.evaluate.benchmarks.contract import Benchmark
from alignkd.pipeline.evaluate.benchmarks.registry import open_benchmark, parse_names
from alignkd.pipeline.runtime.files import check_out_folder

_NAMED = 5
"""Missing pictures that a message names, of each benchmark."""


def open_all(config: BenchmarkRunConfig) -> list[Benchmark]:
    """All benchmarks of a run, limited, their pictures there.

    Raises:
        ConfigError: a name is unknown, or the output folder cannot be used.
        DataError: files are missing or wrong, or pictures are missing; those of all benchmarks are named.
    """
    names = parse_names([config.benchmark])
    check_out_folder(Path(config.out))
    benchmarks = [limited(open_benchmark(name, config.root, config.protocol), config.limit) for name in names]
    check_pictures(benchmarks)
    return benchmarks


def limited(benchmark: Benchmark, limit: int | None) -> Benchmark:
    """A benchmark with its first questions: whole units, until there are ``limit`` questions."""
    if limit is None or limit >= len(benchmark.questions):
        return benchmark
    kept = list[int]()
    for unit in sorted(benchmark.units()):
        if len(kept) >= limit:
            break
        kept.extend(unit)
    return benchmark.only(kept)


def check_pictures(benchmarks: Sequence[Benchmark]) -> None:
    """Refuse benchmarks of which a picture is missing.

    Raises:
        DataError: names the first ones of each, and where to get them.
    """
    found = {benchmark: missing for benchmark in benchmarks if (missing := benchmark.missing_images())}
    if not found:
        return
    words = []
    for benchmark, missing in found.items():
        about, more = benchmark.about, f" and {len(missing) - _NAMED:,} more" if len(missing) > _NAMED else ""
        words.append(
            f"{about.title}: {', '.join(missing[:_NAMED])}{more} in {benchmark.folder} (from {about.source}; licence:"
            f" {about.licence})"
        )
    count = sum(map(len, found.values()))
    are = "picture is" if count == 1 else "pictures are"
    raise DataError(f"{count:,} {are} missing, and no question may be left out. {'. '.join(words)}")
