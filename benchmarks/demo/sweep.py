"""Weights of recipes on the demo's data, judged by training questions of images without labels: never by the test.

A point is a recipe and fields of it: ``align-kd``, ``align-kd,attention=5``. One seed draws the labelled images, the student's
start and the order, the same for all points. One JSON line a point; points that have their line are not run again.

Example: python benchmarks/demo/sweep.py --teacher runs/demo --seed 0 --out runs/sweep-0 sft align-kd align-kd,attention=5
"""

import argparse
import json
import random
import shutil
from pathlib import Path
from typing import Any

from demo_arms import reuse_teacher

from alignkd.losses.recipes import get_recipe
from alignkd.pipeline.config.demo import DemoConfig, Paths
from alignkd.pipeline.config.evaluate import EvaluateConfig
from alignkd.pipeline.demo.run import prepare_data, run_cache, train_student
from alignkd.pipeline.evaluate.runner import evaluate
from alignkd.pipeline.runtime.devices import pick_device

IMAGES = 400
"""Images whose questions judge: about 3,900 questions."""


def write_held_out(paths: Paths, seed: int) -> Path:
    """The questions of some training images without labels."""
    read = {name: json.loads((paths.data / f"{name}.json").read_text()) for name in ("labelled", "train")}
    labelled = {record["image"] for record in read["labelled"]}
    others = [record for record in read["train"] if record["image"] not in labelled]
    images = sorted({record["image"] for record in others})
    random.Random(seed).shuffle(images)
    chosen = set(images[:IMAGES])
    path = paths.data / "held-out.json"
    path.write_text(json.dumps([record for record in others if record["image"] in chosen]))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("points", nargs="+")
    parser.add_argument("--teacher", type=Path, required=True, help="A finished demo, whose tower and teacher are used.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=DemoConfig.student_steps)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device")
    given = parser.parse_args()
    device = pick_device(given.device)
    config = DemoConfig(out=str(given.out), seed=given.seed, device=device, student_steps=given.steps)
    paths, results = Paths(given.out), given.out / "results.jsonl"
    data = prepare_data(config, paths)
    held_out = write_held_out(paths, given.seed)
    if not paths.student_start.exists():
        reuse_teacher(config, paths, given.teacher)
        run_cache(config, paths, data, device)
    done = {json.loads(line)["point"] for line in results.read_text().splitlines()} if results.exists() else set[str]()
    for point in given.points:
        if point in done:
            continue
        name, *fields = point.split(",")
        recipe = get_recipe(name, {"focus_k": str(config.focus_k), **dict(field.split("=") for field in fields)})
        run = paths.student_run(point)
        shutil.rmtree(run, ignore_errors=True)
        train_student(config, paths, data, device, recipe, point)
        found = evaluate(
            EvaluateConfig(
                model=str(run / "student"),
                data=str(held_out),
                images=str(data.root),
                out=str(run / "held-out"),
                batch_size=512,
                max_new_tokens=5,
                device=device,
            )
        )
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        shares = {key.removeprefix("share/"): round(value, 4) for key, value in last.items() if key.startswith("share/")}
        line: dict[str, Any] = {"point": point, "seed": given.seed, "accuracy": found["accuracy"], "shares": shares}
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
