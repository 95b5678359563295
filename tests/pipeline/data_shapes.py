"""The same records written as people have them: Parquet, a saved dataset, WebDataset shards; with the images inside."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def images_of(record: Record) -> list[str]:
    """The references of a record's images."""
    image = record.get("image", record.get("images")) or []
    return [image] if isinstance(image, str) else list(image)


def embedded(record: Record, images: Path | None, paths: bool = True) -> Record:
    """A record with its images as structures of bytes and path in ``images``; of paths alone where ``images`` is None."""
    found = [
        {"bytes": (images / name).read_bytes() if images else None, "path": name if paths else None}
        for name in images_of(record)
    ]
    return {**{k: v for k, v in record.items() if k not in ("image", "images")}, "images": found or None}


def write_parquet(
    path: Path, records: Sequence[Record], images: Path | None, *, shards: int = 1, group: int = 2, paths: bool = True
) -> Path:
    """One Parquet file, or a folder of several; ``group`` rows a row group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [embedded(record, images, paths) for record in records]
    names = ["id", "conversations", "images"]
    rows = [{name: row.get(name) for name in names} for row in rows]
    schema = pa.Table.from_pylist(rows).schema
    if shards == 1:
        pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=group)
        return path
    path.mkdir()
    for number, part in enumerate(parts(rows, shards)):
        table = pa.Table.from_pylist(part, schema)
        pq.write_table(table, path / f"train-{number:05d}-of-{shards:05d}.parquet", row_group_size=group)
    return path


def write_saved(path: Path, records: Sequence[Record], images: Path, *, shards: int = 2, paths: bool = True) -> Path:
    """A folder of ``save_to_disk``."""
    import datasets

    turn = {"from": datasets.Value("string"), "value": datasets.Value("string")}
    features = {"id": datasets.Value("string"), "conversations": [turn], "images": [datasets.Image()]}
    rows = [embedded(record, images, paths) for record in records]
    made = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    made.save_to_disk(str(path), num_shards=shards)
    return path


def write_webdataset(path: Path, records: Sequence[Record], images: Path | None, *, shards: int = 2, paths: bool = True) -> str:
    """Shards of image and JSON members in a folder; returns their names with braces."""
    path.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, part in enumerate(parts(records, shards)):
        with tarfile.open(path / f"{shard:03d}.tar", "w") as tar:
            for record in part:
                names = images_of(record)
                for i, name in enumerate(names if images else ()):
                    middle = f".{i}" if len(names) > 1 else ""
                    add(tar, f"s{number:06d}{middle}{Path(name).suffix}", (images / name).read_bytes())
                kept = record if paths else {k: v for k, v in record.items() if k not in ("image", "images")}
                add(tar, f"s{number:06d}.json", json.dumps(kept).encode())
                number += 1
    return f"{path}/{{000..{shards - 1:03d}}}.tar"


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """A regular file in an archive."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def parts(records: Sequence[Any], count: int) -> list[Sequence[Any]]:
    """Records in so many parts, in their order."""
    each = -(-len(records) // count)
    return [records[i * each : (i + 1) * each] for i in range(count)]
