"""``kill -9`` at random instants, many times: does a cache ever lose, double or damage a sample?

Each run draws a shard format and a place (a local folder, or a real S3 server on loopback) and has real workers write a cache
of tiny samples. All of them are killed at a random instant of the time that the shards left take undisturbed, one to three
times, each time with another number of workers; a last round continues to the end. Exit code 1 where any run does not end with
every planned sample once, no problem found by ``verify``, and the content sha256 of the undisturbed run.

Example: python benchmarks/damage/crash_runs.py --runs 100 --workers 4 --out crash_runs.json
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "pipeline"))

from crashes import Crashes, crash_run, finish, look_at, start_workers
from s3_server import S3, let_in, new_bucket, serving
from tiny_runs import numbered, write_data
from warm_door import WarmDoor

FORMATS = ("zarr", "webdataset")
PLACES = ("local", "s3")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=36)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON of all runs")
    return parser.parse_args()


def draw(chance: random.Random, shard_format: str, workers: int, seconds: float) -> Crashes:
    kills = chance.randint(1, 3)
    others = [chance.randint(1, workers) for _ in range(kills)]
    return Crashes(shard_format, chance.random() < 0.5, [workers, *others], [chance.random() for _ in range(kills)], seconds)


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, serving() as s3, pytest.MonkeyPatch.context() as patch:
        let_in(s3, patch)
        door = WarmDoor(Path(name))
        data = write_data(Path(name) / "data.json", numbered(arguments.samples))
        runs = Runs(arguments, Path(name), s3, door, data)
        runs.undisturbed()
        for number in range(arguments.runs):
            runs.run(number)
        door.close()
    result = runs.summary()
    if arguments.out:
        arguments.out.write_text(json.dumps({**result, "each": runs.each}, indent=2) + "\n")
    print(json.dumps(result))
    sys.exit(0 if result["sound"] == result["runs"] else 1)


class Runs:
    """All runs, and what an undisturbed one gives."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, s3: S3, door: WarmDoor, data: Path) -> None:
        self.arguments, self.folder, self.s3, self.door, self.data = arguments, folder, s3, door, data
        self.chance = random.Random(arguments.seed)
        self.expected: dict[str, str] = {}
        self.seconds: dict[tuple[str, str], float] = {}
        self.each: list[dict[str, object]] = []

    def place(self, place: str, name: str) -> str:
        return f"{new_bucket(self.s3)}/{name}" if place == "s3" else str(self.folder / name)

    def undisturbed(self) -> None:
        self.door("--version")
        for shard_format in FORMATS:
            for place in PLACES:
                cache = self.place(place, f"undisturbed-{shard_format}")
                started = time.perf_counter()
                workers = start_workers(self.door, self.data, cache, self.arguments.workers, shard_format, steal=False)
                failures = finish(workers)
                self.seconds[shard_format, place] = time.perf_counter() - started
                outcome = look_at(cache, failures, [], self.seconds[shard_format, place])
                assert outcome.sound, outcome
                self.expected.setdefault(shard_format, outcome.content_sha256)
                assert outcome.content_sha256 == self.expected[shard_format], (shard_format, place)

    def run(self, number: int) -> None:
        shard_format, place = self.chance.choice(FORMATS), self.chance.choice(PLACES)
        crashes = draw(self.chance, shard_format, self.arguments.workers, self.seconds[shard_format, place])
        outcome = crash_run(self.door, self.data, self.place(place, f"run-{number}"), crashes)
        sound = outcome.sound and outcome.content_sha256 == self.expected[shard_format]
        self.each.append({"place": place, **asdict(crashes), **asdict(outcome), "sound": sound})
        instants = ", ".join(f"{instant:.0%}" for instant in crashes.instants)
        print(
            f"{number:3d} {shard_format:<10} {place:<5} workers {crashes.workers}, killed at {instants} of what was left with"
            f" {outcome.committed_at_kills} shards committed, {outcome.strays} strays, {outcome.seconds:.1f} s:"
            f" {'sound' if sound else outcome}",
            flush=True,
        )

    def summary(self) -> dict[str, object]:
        shards = -(-self.arguments.samples // 2)
        kills = [count for run in self.each for count in run["committed_at_kills"]]
        return {
            "runs": len(self.each),
            "sound": sum(bool(run["sound"]) for run in self.each),
            "kills": len(kills),
            "kills_with_some_but_not_all_shards_committed": sum(0 < count < shards for count in kills),
            "missing": sum(run["missing"] for run in self.each),
            "duplicated": sum(run["duplicated"] for run in self.each),
            "problems": sum(len(run["problems"]) for run in self.each),
            "runs_with_strays": sum(run["strays"] > 0 for run in self.each),
            "other_content": sum(run["content_sha256"] != self.expected[run["shard_format"]] for run in self.each),
            "samples": self.arguments.samples,
            "workers": self.arguments.workers,
            "undisturbed_seconds": {" ".join(key): round(value, 2) for key, value in self.seconds.items()},
            "median_run_seconds": round(statistics.median(run["seconds"] for run in self.each), 2) if self.each else None,
        }


if __name__ == "__main__":
    main()
