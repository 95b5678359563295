"""The benchmarks by name. Each is imported when it is asked for."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from alignkd.errors import ConfigError, DataError
from alignkd.pipeline.evaluate.benchmarks.contract import Benchmark

_MODULES = {
    "gqa": "gqa:Gqa",
    "sqa": "sqa:ScienceQa",
    "textvqa": "textvqa:TextVqa",
    "mme": "mme:Mme",
    "mmbench": "mmbench:MmBench",
    "pope": "pope:Pope",
    "vqav2": "vqav2:VqaV2",
    "llava": "llava:LlavaQuestions",
}
BENCHMARKS = tuple(_MODULES)
"""All names."""
SIX = BENCHMARKS[:6]
"""Those whose average papers print."""


def benchmark_class(name: str) -> type[Benchmark]:
    """A benchmark by its name.

    Raises:
        ConfigError: lists the known ones.
    """
    if name not in _MODULES:
        raise ConfigError(f"--benchmark {name!r}: known are {', '.join(BENCHMARKS)}")
    module, _, attribute = _MODULES[name].partition(":")
    found: type[Benchmark] = getattr(import_module(f"alignkd.pipeline.evaluate.benchmarks.{module}"), attribute)
    return found


def open_benchmark(name: str, root: str | Path, protocol: str = "mobilevlm") -> Benchmark:
    """A benchmark of ``root``, which holds one folder for each benchmark, or is the benchmark's own folder.

    Raises:
        ConfigError: the name is unknown.
        DataError: there is no such folder, or as :meth:`Benchmark.open`.
    """
    kind, root = benchmark_class(name), Path(root)
    if not root.is_dir():
        raise DataError(f"--root {root} is not a folder; expected one that holds {name}/, laid out as docs/benchmarks.md shows")
    return kind.open(folder if (folder := root / name).is_dir() else root, protocol)


def parse_names(names: Sequence[str]) -> tuple[str, ...]:
    """Names from ``--benchmark a,b``, each once, checked.

    Raises:
        ConfigError: one is unknown, or none is given.
    """
    chosen = tuple(dict.fromkeys(word.strip() for name in names for word in name.split(",") if word.strip()))
    if not chosen:
        raise ConfigError(f"--benchmark names none; known are {', '.join(BENCHMARKS)}")
    for name in chosen:
        benchmark_class(name)
    return chosen
