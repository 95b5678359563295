"""Seconds and memory of ``alignkd check`` over a million LLaVA samples, without reading their images.

python benchmarks/check_a_million.py            # a JSON list, and JSON lines
python benchmarks/check_a_million.py 100000     # fewer samples
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = [
    "the",
    "a",
    "dog",
    "cat",
    "red",
    "green",
    "small",
    "which",
    "of",
    "these",
    "is",
    "in",
    "image",
    "what",
    "colour",
    "two",
]


def write(path: Path, samples: int, *, lines: bool) -> None:
    """Samples of the lengths of LLaVA's instruction data: 60 words a turn and 1 to 5 rounds, one in ten without an image."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(5, 115))) for _ in range(5000)]
    with path.open("w") as file:
        file.write("" if lines else "[\n")
        for number in range(samples):
            turns = []
            for turn in range(rng.choice((1, 1, 2, 3, 5))):
                tag = "<image>\n" if turn == 0 and number % 10 else ""
                turns += [
                    {"from": "human", "value": tag + rng.choice(texts)},
                    {"from": "gpt", "value": rng.choice(texts)},
                ]
            record = {"id": f"{number:09d}", "conversations": turns}
            if number % 10:
                record["image"] = f"coco/train2017/{number // 2:012d}.jpg"
            file.write(json.dumps(record) + ("\n" if lines or number == samples - 1 else ",\n"))
        file.write("" if lines else "]\n")


def main() -> None:
    samples = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        for name in ("list.json", "lines.jsonl"):
            path = Path(folder) / name
            write(path, samples, lines=name.endswith("jsonl"))
            command = [sys.executable, "-m", "alignkd", "check", "--data", str(path), "--no-read-images", "--json"]
            before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            seconds, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            found = json.loads(done.stdout)
            print(
                f"{name}: {found['samples']:,} samples, {path.stat().st_size / 1e9:.2f} GB: {seconds:.1f} s"
                f" ({cpu:.1f} s of processor time), {after.ru_maxrss / 1e6:.2f} GB in the largest process"
            )
            path.unlink()


if __name__ == "__main__":
    main()
