"""Table of several runs of demo_arms.py: accuracy a seed and arm, mean, and the paired difference to plain fine-tuning.

Example: python benchmarks/demo/arms_table.py runs/arms-0 runs/arms-1
"""

import json
import math
import statistics
import sys
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
    accuracy = read([Path(name) for name in sys.argv[1:]])
    seeds = sorted({seed for arm in accuracy.values() for seed in arm})
    print("| arm |" + "".join(f" seed {s} |" for s in seeds) + " mean | minus sft, paired |")
    print("|---|" + "---|" * (len(seeds) + 2))
    for arm, values in accuracy.items():
        cells = "".join(f" {values[s]:.1f} |" if s in values else " |" for s in seeds)
        paired = [values[s] - accuracy["sft"][s] for s in seeds if s in values and s in accuracy["sft"]]
        print(f"| {arm} |{cells} {interval(list(values.values()))} | {interval(paired) if arm != 'sft' else ''} |")


if __name__ == "__main__":
    main()
