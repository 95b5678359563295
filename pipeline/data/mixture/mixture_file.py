"""A mixture of datasets in YAML: ``datasets: [{name, data, images, weight, limit}]``.

Paths are relative to the folder of the file. ``name`` defaults to the name of the data, ``images`` to ``--images``.
"""

from pathlib import Path
from typing import Any

from alignkd.errors import ConfigError
from alignkd.pipeline.data.contract import Source
from alignkd.plain_files import read_plain

SUFFIXES = (".yaml", ".yml")
_KEYS = ("name", "data", "images", "weight", "limit")
_MAX_BYTES = 2**20
_MOST_DATASETS = 10_000
LARGEST_WEIGHT = 1000.0


def is_mixture(data: str) -> bool:
    """Whether ``--data`` names a mixture."""
    return data.lower().endswith(SUFFIXES)


def read_mixture(path: str, images: str | None, weight: float, *, merge_turns: bool) -> list[Source]:
    """The datasets of a mixture; ``images`` and ``weight``: of the command line, a default and a factor.

    Raises:
        ConfigError: names the file, the dataset, what was found and what was expected.
    """
    import yaml

    try:
        found = yaml.safe_load(read_plain(Path(path), _MAX_BYTES).decode())
    except OSError as error:
        raise ConfigError(f"--data {path}: {error.strerror or error}; expected a mixture of datasets in YAML") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"--data {path} is not YAML: {error}") from error
    datasets = found.get("datasets") if isinstance(found, dict) and found.keys() == {"datasets"} else None
    if not isinstance(datasets, list) or not 0 < len(datasets) <= _MOST_DATASETS:
        raise ConfigError(f"--data {path}: expected one key, datasets, with a list of objects of {', '.join(_KEYS)}")
    sources = [_dataset(path, number, one, images, weight, merge_turns) for number, one in enumerate(datasets)]
    names = [source.name for source in sources]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"--data {path}: two datasets are named {twice!r}; give each a name of its own")
    return sources


def _dataset(path: str, number: int, found: Any, images: str | None, weight: float, merge_turns: bool) -> Source:
    where = f"--data {path}, dataset {number}"
    if not isinstance(found, dict) or not isinstance(found.get("data"), str) or not found["data"]:
        raise ConfigError(f"{where}: expected an object with data, a path or URL, and any of {', '.join(_KEYS)}")
    if unknown := [str(key) for key in found if key not in _KEYS]:
        raise ConfigError(f"{where}: {', '.join(unknown)} is not known; known are {', '.join(_KEYS)}")
    data = _beside(path, found["data"])
    if is_mixture(data):
        raise ConfigError(f"{where}: a mixture cannot hold another mixture ({found['data']}): name its datasets here")
    name, own, share, limit = (found.get(key) for key in ("name", "images", "weight", "limit"))
    if not isinstance(name, str | None) or not isinstance(own, str | None):
        raise ConfigError(f"{where}: name and images are texts; found {name!r:.80} and {own!r:.80}")
    if share is not None and not (type(share) in (int, float) and 0 < share <= LARGEST_WEIGHT):
        raise ConfigError(f"{where}: weight is {share!r:.80}, expected a number above 0, at most {LARGEST_WEIGHT:,.0f}")
    if limit is not None and not (type(limit) is int and limit >= 1):
        raise ConfigError(f"{where}: limit is {limit!r:.80}, expected a whole number of 1 or more")
    return Source(
        data,
        images if own is None else _beside(path, own),
        name=name or Path(data).name,
        weight=weight * (1.0 if share is None else float(share)),
        limit=limit,
        merge_turns=merge_turns,
    )


def _beside(path: str, name: str) -> str:
    return name if "://" in name else str(Path(path).parent / name)
