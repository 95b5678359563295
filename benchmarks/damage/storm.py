"""A storm of faults over both stages: is anything lost or double, does anything hang, is every exit code right?

Each round draws a stage, a shard format, a place (a folder, or a real S3 server on loopback) and faults: ``kill -9``, SIGTERM,
SIGHUP, a full disk, EIO, ESTALE, S3 answers (500, 503, lost connections, slow), a killed loader, a step of the clock, a second
job on the same output. The command meets them, then the same command runs undisturbed to its end. Sound is a round in which

* every process ended within ``--patience`` seconds,
* every exit code was one of those that the fault allows (a disturbed run may also end before its fault meets it),
* the cache has every planned sample once, ``verify`` finds nothing, and its content is that of an undisturbed run; or the
  student's weights are, and the log has every step once.

Exit code 1 where any round is not sound. Example: python benchmarks/damage/storm.py --faults 200 --out storm.json
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "pipeline"))

from s3_server import let_in, serving
from storm_faults import StormDoor
from storm_rounds import Round, StageOneRounds, StageTwoRounds
from tiny_runs import numbered, write_data


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patience", type=float, default=120.0, help="seconds after which a process counts as hanging")
    parser.add_argument("--only", help="only faults whose name begins so")
    parser.add_argument("--out", type=Path, help="JSON of all rounds")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    chance, rounds, started = random.Random(arguments.seed), list[Round](), time.perf_counter()
    with tempfile.TemporaryDirectory() as name, serving() as s3, pytest.MonkeyPatch.context() as patch:
        let_in(s3, patch)
        folder = Path(name)
        door = StormDoor(folder)
        data = write_data(folder / "data.json", numbered(arguments.samples))
        stages = [stage(door, data, folder, s3, arguments.patience) for stage in (StageOneRounds, StageTwoRounds)]
        while sum(len(done.faults) for done in rounds) < arguments.faults:
            done = chance.choice(stages).run(chance, len(rounds), arguments.only)
            rounds.append(done)
            print(f"{len(rounds):3d} {done}", flush=True)
        door.close()
    result = summary(rounds) | {"seconds": round(time.perf_counter() - started)}
    if arguments.out:
        arguments.out.write_text(json.dumps({**result, "rounds": [vars(done) for done in rounds]}, indent=2) + "\n")
    print(json.dumps(result))
    sys.exit(0 if result["sound"] == result["rounds"] else 1)


def summary(rounds: list[Round]) -> dict[str, object]:
    """Counts over all rounds."""
    return {
        "rounds": len(rounds),
        "sound": sum(not done.problems for done in rounds),
        "faults": sum(len(done.faults) for done in rounds),
        "faults_by_kind": dict(sorted(Counter(fault for done in rounds for fault in done.faults).items())),
        "rounds_by_place": dict(sorted(Counter(f"{done.stage}, {done.place}" for done in rounds).items())),
        "disturbed_exit_codes": dict(sorted(Counter(str(code) for done in rounds for code in done.codes).items())),
        "hangs": sum(done.hangs for done in rounds),
        "problems": [problem for done in rounds for problem in done.problems],
    }


if __name__ == "__main__":
    main()
