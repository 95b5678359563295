"""Flip bits of a small cache and cut its objects off, at random, and count what the audit and the reader find.

Example: python benchmarks/damage/flips.py --count 1000
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "cache_store"))

from cache_flips import is_found, random_damages, small_cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="flips and truncations in each format")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for shard_format in ("zarr", "webdataset"):
        with tempfile.TemporaryDirectory() as folder:
            cache = small_cache(Path(folder) / "cache", shard_format)
            damages, started = random_damages(cache, arguments.count, arguments.seed), time.perf_counter()
            missed = [damage for damage in damages if not is_found(cache, damage)]
        cuts = sum(damage.bit is None for damage in damages)
        print(
            f"{shard_format}: {len(damages) - len(missed)} of {len(damages)} found "
            f"({len(damages) - cuts} flips, {cuts} truncations; {time.perf_counter() - started:.0f} s)"
        )
        for damage in missed:
            print(f"  missed: {damage}")


if __name__ == "__main__":
    main()
