"""A million samples of each shape of data: seconds and memory of the index, and samples a second at random.

    OMP_NUM_THREADS=1 python benchmarks/data_readers.py --folder /tmp/data-readers [--samples 1000000] [--shape llava-jsonl ...]

Each shape is written once into the folder, and measured in a process of its own.
"""

import argparse
import gzip
import itertools
import json
import os
import resource
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

IMAGE = bytes(1000)
WORDS = """the a dog red ball stands near two tall trees behind house what colour is it which of these people holds an
umbrella""".split()  # noqa: SIM905


def records(samples: int) -> Iterator[dict]:
    """LLaVA records of about 600 bytes: two rounds, one image, as in its instruction data."""
    generator = np.random.default_rng(0)
    for number in range(samples):
        text = [" ".join(WORDS[i] for i in generator.integers(0, len(WORDS), n)) for n in (12, 30, 12, 40)]
        turns = [{"from": ("human", "gpt")[i % 2], "value": ("" if i else "<image>\n") + one} for i, one in enumerate(text)]
        yield {"id": f"{number:09d}", "image": f"coco/train2017/{number % 100_000:012d}.jpg", "conversations": turns}


def as_messages(record: dict) -> dict:
    """A LLaVA record as messages with typed contents."""
    messages = []
    for turn in record["conversations"]:
        tag, _, text = turn["value"].rpartition("<image>\n")
        items = ([{"type": "image"}] if tag or text != turn["value"] else []) + [{"type": "text", "text": text}]
        messages.append({"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": items})
    return {"id": record["id"], "images": [record["image"]], "messages": messages}


def _lines(made: Iterator[dict], path: Path) -> None:
    with gzip.open(path, "wt", compresslevel=1) if path.suffix == ".gz" else path.open("w") as file:
        file.writelines(json.dumps(one) + "\n" for one in made)


def _list(made: Iterator[dict], path: Path) -> None:
    with path.open("w") as file:
        for number, one in enumerate(made):
            file.write(("[" if number == 0 else ",\n") + json.dumps(one))
        file.write("]")


def _tables(made: Iterator[dict]) -> Iterator[Any]:
    """The records in tables of 1,000 rows, with an image of 1 kB each inside."""
    import pyarrow as pa

    while rows := list(itertools.islice(made, 1000)):
        yield pa.Table.from_pylist([{**row, "image": {"bytes": IMAGE, "path": row["image"]}} for row in rows])


def _parquet(made: Iterator[dict], path: Path) -> None:
    import pyarrow.parquet as pq

    tables = _tables(made)
    first = next(tables)
    with pq.ParquetWriter(path, first.schema) as writer:
        for table in itertools.chain([first], tables):
            writer.write_table(table)


def _saved(made: Iterator[dict], path: Path) -> None:
    """The files of ``save_to_disk``."""
    import pyarrow as pa

    path.mkdir()
    tables = _tables(made)
    first = next(tables)
    with pa.ipc.new_stream(str(path / "data-00000-of-00001.arrow"), first.schema) as writer:
        for table in itertools.chain([first], tables):
            writer.write_table(table)
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))


def _shards(made: Iterator[dict], path: Path) -> None:
    """WebDataset shards of 100,000 samples, with an image of 1 kB each."""
    path.mkdir()
    for shard in itertools.count():
        records = itertools.islice(made, 100_000)
        first = next(records, None)
        if first is None:
            return
        with (path / f"{shard:03d}.tar").open("wb") as file:
            for record in itertools.chain([first], records):
                for suffix, content in (("jpg", IMAGE), ("json", json.dumps(record).encode())):
                    info = tarfile.TarInfo(f"{record['id']}.{suffix}")
                    info.size = len(content)
                    file.write(info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512))
            file.write(bytes(1024))


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))


SHAPES: dict[str, tuple[str, Callable[[Iterator[dict], Path], None]]] = {
    "llava-json": ("d.json", _list),
    "llava-jsonl": ("d.jsonl", _lines),
    "llava-jsonl-gz": ("d.jsonl.gz", _lines),
    "messages-jsonl": ("messages.jsonl", lambda made, path: _lines(map(as_messages, made), path)),
    "parquet": ("d.parquet", _parquet),
    "saved": ("saved", _saved),
    "webdataset": ("shards", _shards),
}
"""The name of the data in the folder, and what writes it."""


def measure(path: str) -> dict:
    """Index some data, and read samples at random."""
    from alignkd.pipeline.config.shared import DataSettings
    from alignkd.pipeline.data.open_samples import open_samples

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, cpu = time.perf_counter(), time.process_time()
    samples = open_samples(DataSettings(data=path, images="/images"))
    indexed, indexed_cpu = time.perf_counter() - started, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    chosen = np.random.default_rng(1).integers(0, len(samples), 20_000).tolist()
    started, cpu = time.perf_counter(), time.process_time()
    for index in chosen:
        assert samples[index].places
    rate, rate_cpu = len(chosen) / (time.perf_counter() - started), len(chosen) / (time.process_time() - cpu)
    return {
        "samples": len(samples),
        "index_seconds": round(indexed, 1),
        "index_cpu_seconds": round(indexed_cpu, 1),
        "peak_mb": round(peak / 1000),
        "of_that_before_mb": round(before / 1000),
        "samples_per_second": round(rate),
        "samples_per_cpu_second": round(rate_cpu),
    }


def main() -> None:
    """Write what is missing, measure each shape in a process of its own, and print one line for each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--shape", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure)))
        return
    environment = {**os.environ, "ALIGNKD_CACHE": str(given.folder / "local-cache")}
    for shape in given.shape:
        name, write = SHAPES[shape]
        path = given.folder / shape / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write(records(given.samples), path)
        words = [sys.executable, __file__, "--folder", str(given.folder), "--measure", str(path)]
        found = json.loads(subprocess.run(words, env=environment, check=True, capture_output=True, text=True).stdout)
        print(shape, json.dumps({"mb": round(_size(path) / 1e6), **found}), flush=True)


if __name__ == "__main__":
    main()
