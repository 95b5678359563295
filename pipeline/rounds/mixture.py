"""The data of a step, as a mixture of datasets in YAML."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from alignkd.pipeline.data.contract import Source
from alignkd.pipeline.runtime.files import replace_text
from alignkd.plain_files import read_plain

_LARGEST = 64 * 2**20


@dataclass(frozen=True)
class Dataset:
    """One entry of a mixture; paths are absolute, or URLs."""

    name: str
    data: str
    images: str | None
    weight: float = 1.0
    limit: int | None = None

    @classmethod
    def of_answers(cls, name: str, path: Path) -> "Dataset":
        """Answers that ``alignkd answer`` wrote; its record says where their images are: with the data's, or beside them."""
        record = json.loads(read_plain(Path(f"{path}.run") / "result.json", _LARGEST))
        images = record["images"]
        return cls(name, str(path), None if images is None else absolute(str(images)))

    @classmethod
    def of(cls, source: Source) -> "Dataset":
        """One of the data that the user gave."""
        images = None if source.images is None else absolute(source.images)
        name = source.name or Path(source.data).name
        return cls(name, absolute(source.data), images, source.weight, source.limit)

    def weighted(self, factor: float) -> "Dataset":
        """The same, taken so many times as often."""
        return replace(self, weight=self.weight * factor)


def absolute(path: str) -> str:
    """A path that does not depend on the working folder; a URL as it is."""
    return path if "://" in path else str(Path(path).absolute())


def write_mixture(path: Path, datasets: tuple[Dataset, ...]) -> None:
    """Write what ``--data`` takes."""
    import yaml

    given = [{key: value for key, value in vars(dataset).items() if value is not None} for dataset in datasets]
    replace_text(path, yaml.safe_dump({"datasets": given}, sort_keys=False, allow_unicode=True))
