"""Plan and resume at the size of a real run: a synthetic LLaVA list, streamed; times and peak memory.

Between the two it commits every shard, which takes minutes and is not measured.

Example: python benchmarks/planning.py --samples 1000000 --folder /scratch/planning
"""

import argparse
import json
import random
import resource
import shutil
import time
from pathlib import Path

import numpy as np

from alignkd.cache_store.protocol.store import CacheStore, open_store
from alignkd.cache_store.rows.encode import encode_row
from alignkd.cache_store.rows.row import Row
from alignkd.cache_store.rows.spec import CacheSpec, FieldSpec
from alignkd.pipeline.config.cache_teacher import CacheTeacherConfig
from alignkd.pipeline.stage_one.planned_samples import find_samples

WORDS = ["the", "image", "shows", "a", "large", "dog", "across", "green", "field", "with", "blue", "sky", "and", "people"]
SPEC = CacheSpec((FieldSpec("value", (), "float32", "exact"),), {"teacher": "none: this measures planning"})


def write_data(path: Path, samples: int) -> None:
    generator = random.Random(0)

    def text(words: int) -> str:
        return " ".join(generator.choices(WORDS, k=words))

    with path.open("w") as file:
        file.write("[")
        for i in range(samples):
            turns = [("human", f"<image>\n{text(20)}"), ("gpt", text(60)), ("human", text(15)), ("gpt", text(50))]
            record = {
                "id": f"{i:012d}",
                "image": f"coco/train2017/{i:012d}.jpg",
                "conversations": [{"from": speaker, "value": value} for speaker, value in turns],
            }
            file.write((", " if i else "") + json.dumps(record))
        file.write("]\n")


def commit_all(store: CacheStore) -> None:
    value = {"value": np.zeros((), np.float32)}
    for number in store.pending():
        store.commit_shard(number, [encode_row(SPEC, Row(key, "", "", value)) for key in store.plan.keys_of(number)], [])


def peak_gb() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    data, cache = arguments.folder / "data.json", arguments.folder / "cache"
    if not data.exists():
        write_data(data, arguments.samples)
    shutil.rmtree(cache, ignore_errors=True)
    config = CacheTeacherConfig(teacher="", data=str(data), images=None, cache=str(cache))
    figures = {"data_gb": round(data.stat().st_size / 1e9, 3), "peak_gb_before": peak_gb()}

    started = time.perf_counter()
    _, plan = find_samples(config)
    store = CacheStore.create_or_open(cache, SPEC, plan, shard_format="webdataset")
    figures |= {"samples": plan.samples, "plan_seconds": round(time.perf_counter() - started, 2), "peak_gb_plan": peak_gb()}

    commit_all(store)
    started = time.perf_counter()
    _, plan = find_samples(config)
    store = CacheStore.create_or_open(cache, SPEC, plan, shard_format="webdataset")
    store.sweep(min_age_s=3600)
    pending, status = store.pending(), store.status()
    figures |= {
        "resume_scan_seconds": round(time.perf_counter() - started, 2),
        "shards": status.shards_done,
        "pending": len(pending),
        "rows": open_store(cache).status().samples_done,
        "peak_gb_resume": peak_gb(),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
