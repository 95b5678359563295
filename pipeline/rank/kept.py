"""Write the samples that are kept: as keys, as a ranking, or as data."""

import json
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any

from alignkd.errors import ConfigError, SampleError
from alignkd.pipeline.config.rank import RankConfig
from alignkd.pipeline.config.shared import several
from alignkd.pipeline.data.contract import Samples
from alignkd.pipeline.data.sample import Sample, read_sample
from alignkd.pipeline.runtime.files import check_out_folder, replace_text

_AS_DATA, _AS_RANKING = (".json", ".jsonl"), (".jsonl",)


def check_out_file(config: RankConfig) -> None:
    """Refuse, before the work, a file that cannot be written or whose name says another form.

    Raises:
        ConfigError: names it, and what was expected.
    """
    if config.out is None:
        return
    path, suffixes = Path(config.out), (*(_AS_DATA if config.data else _AS_RANKING), ".txt")
    if path.suffix not in suffixes:
        raise ConfigError(f"--out {config.out}: expected a name that ends in {', '.join(suffixes)}")
    if path.is_dir():
        raise ConfigError(f"--out {config.out} is a folder: give the name of a file")
    if path.exists() and any(Path(data).exists() and path.samefile(data) for data in several(config.data)):
        raise ConfigError(f"--out {config.out} is --data itself, which would be lost: choose another name")
    check_out_folder(path.absolute().parent)


def write_keys(path: Path, keys: Sequence[str]) -> None:
    """One key a line, best first."""
    replace_text(path, "".join(f"{key}\n" for key in keys))


def write_ranking(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line, best first."""
    replace_text(path, "".join(f"{json.dumps(line)}\n" for line in lines))


def write_samples(path: Path, samples: Samples, keys: Set[str]) -> None:
    """The samples with one of these keys as LLaVA records, in the order of the data: their keys, and rows, stay the same.

    Raises:
        ConfigError: a sample that no such record can hold; names it, and what to do.
    """
    records = [_record(sample, path) for sample in _of_keys(samples, keys)]
    if path.suffix == ".jsonl":
        replace_text(path, "".join(f"{json.dumps(record)}\n" for record in records))
    else:
        replace_text(path, json.dumps(records, indent=1) + "\n")


def _of_keys(samples: Samples, keys: Set[str]) -> Iterator[Sample]:
    return (samples[index] for index in range(len(samples)) if samples.key(index) in keys)


def _record(sample: Sample, path: Path) -> dict[str, Any]:
    record: dict[str, Any] = {"id": sample.id}
    if sample.images:
        record["image"] = sample.images[0] if len(sample.images) == 1 else list(sample.images)
    record["conversations"] = [{"from": speaker, "value": text} for speaker, text in sample.turns]
    if sample.provenance:
        record["provenance"] = {"model": sample.provenance}
    try:
        same = read_sample(record).key == sample.key
    except SampleError:
        same = False
    unnamed = [place for image, place in zip(sample.images, sample.places, strict=False) if not place.endswith(image)]
    if not same or unnamed:
        why = "its image is held by the data, and has no path" if unnamed else "it would be read otherwise"
        raise ConfigError(
            f"sample {sample.id!r} cannot stand in a LLaVA file ({why}): give {path.with_suffix('.txt')} as --out, to write the"
            " keys of the samples"
        )
    return record
