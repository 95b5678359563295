"""Table of several runs of demo_arms.py: accuracy a seed and arm, mean, and the paired difference to one arm.

Example: python benchmarks/demo/arms_table.py runs/arms-0 runs/arms-1 --against sft
"""

import argparse
import json
import math
import statistics
from pathlib import Path

# Two-sided 95 % quantiles of Student's t by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def read(folders: list[Path]) -> dict[str, dict[int, float]]:
    """Accuracy in percent by arm and seed, from each student's own result."""
    found: dict[str, dict[int, float]] = {}
    for folder in folders:
        for result in sorted(folder.glob("student-*/test/result.json")):
            run = json.loads((result.parent.parent / "run.json").read_text())
            arm = result.parent.parent.name.removeprefix("student-")
            found.setdefault(arm, {})[run["configuration"]["seed"]] = 100 * json.loads(result.read_text())["accuracy"]
    return found


def interval(values: list[float]) -> str:
    """Mean and half-width of its 95 % interval."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.1f}"
    half = T95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.1f} ± {half:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--against", default="sft", help="the arm that the others are compared with")
    arguments = parser.parse_args()
    accuracy, against = read(arguments.folders), arguments.against
    seeds = sorted({seed for arm in accuracy.values() for seed in arm})
    print("| arm |" + "".join(f" seed {s} |" for s in seeds) + f" mean | minus {against}, paired |")
    print("|---|" + "---|" * (len(seeds) + 2))
    for arm, values in accuracy.items():
        cells = "".join(f" {values[s]:.1f} |" if s in values else " |" for s in seeds)
        paired = [values[s] - accuracy[against][s] for s in seeds if s in values and s in accuracy[against]]
        print(f"| {arm} |{cells} {interval(list(values.values()))} | {interval(paired) if arm != against else ''} |")


if __name__ == "__main__":
    main()
