"""The demo's comparison over more arms than two: one seed a process, one JSON a seed.

Example: python benchmarks/demo/demo_arms.py --seed 0 --out runs/arms-0 --device cuda
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from transformers import set_seed

from alignkd.losses.recipes import get_recipe
from alignkd.models.loading import load_vlm
from alignkd.pipeline.config.demo import DemoConfig, Paths
from alignkd.pipeline.config.targets import TargetSettings
from alignkd.pipeline.demo.checkpoints import new_checkpoint
from alignkd.pipeline.demo.run import prepare_data, prepare_models, run_cache, test_accuracy, train_student, train_teacher
from alignkd.pipeline.feeding import order
from alignkd.pipeline.runtime.devices import pick_device
from alignkd.pipeline.runtime.run_record import collect_versions
from alignkd.targets.logits import LogitSettings

NOT_GROUPED = "align-kd not grouped"
"""Align-KD on batches of any lengths."""

ARMS: dict[str, tuple[str, dict[str, str]]] = {
    "sft": ("sft", {}),
    "align-kd": ("align-kd", {}),
    NOT_GROUPED: ("align-kd", {}),
    "paper": ("paper", {}),
    "logits-only": ("logits-only", {}),
    "attention only": ("align-kd", {"reverse_kl": "0", "vision": "0"}),
    "vision only": ("align-kd", {"reverse_kl": "0", "attention": "0"}),
}


EXACT = TargetSettings(attention_codec="exact", vision_codec="exact", logits=LogitSettings("hidden", hidden_bits=16))


def reuse_teacher(config: DemoConfig, paths: Paths, demo: Path) -> dict[str, float]:
    """Take tower, tokenizer and teacher of another run; a new student start is drawn from this run's seed."""
    for name in ("tokenizer", "teacher"):
        (paths.out / name).symlink_to((demo / name).resolve())
    set_seed(config.seed)
    new_checkpoint(paths.tokenizer, load_vlm(paths.teacher).tower, config.student, paths.student_start)
    return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device")
    parser.add_argument("--teacher", type=Path, help="a finished demo whose tower and teacher are used again")
    parser.add_argument("--arms", default=",".join(name for name in ARMS if name != NOT_GROUPED))
    parser.add_argument("--extra", action="append", default=[], help="NAME:RECIPE:key=value,key=value")
    parser.add_argument("--set", dest="fields", action="append", default=[], help="DemoConfig field=number")
    parser.add_argument("--exact", action="store_true", help="cache without loss (hidden states in 16 bits), to compare codecs")
    parser.add_argument("--always-group", action="store_true", help="group by length also where lengths hardly differ, as here")
    arguments = parser.parse_args()
    if arguments.always_group:
        order.is_worth_grouping = lambda lengths: True
    changed: dict[str, Any] = {k: json.loads(v) for k, _, v in (text.partition("=") for text in arguments.fields)}
    if arguments.exact:
        changed["targets"] = EXACT
    config = dataclasses.replace(DemoConfig(out=str(arguments.out), seed=arguments.seed, device=arguments.device), **changed)
    paths, device = Paths(arguments.out), pick_device(arguments.device)
    started = time.perf_counter()
    data = prepare_data(config, paths)
    if arguments.teacher:
        tower = reuse_teacher(config, paths, arguments.teacher)
    else:
        tower = prepare_models(config, paths, data, device)
        train_teacher(config, paths, data, device)
    cache = run_cache(config, paths, data, device)
    accuracy = {"teacher": test_accuracy(paths.teacher, paths, data, device)["accuracy"]}
    wanted = {name: ARMS[name] for name in arguments.arms.split(",") if name}
    for text in arguments.extra:
        name, recipe, pairs = text.split(":")
        wanted[name] = (recipe, dict(pair.split("=") for pair in pairs.split(",")))
    seconds = {}
    for name, (recipe, overrides) in wanted.items():
        began = time.perf_counter()
        chosen = get_recipe(recipe, {"focus_k": str(config.focus_k), **overrides})
        train_student(dataclasses.replace(config, group_by_length=name != NOT_GROUPED), paths, data, device, chosen, name)
        seconds[name] = round(time.perf_counter() - began, 1)
        accuracy[name] = test_accuracy(paths.student_run(name) / "student", paths, data, device)["accuracy"]
        print(config.seed, name, f"{accuracy[name]:.4f}", f"{seconds[name]} s", flush=True)
    result = {
        "seed": config.seed,
        "tower": tower,
        "accuracy": accuracy,
        "seconds": seconds,
        "labelled_questions": cache["samples"],
        "total_seconds": round(time.perf_counter() - started, 1),
        "versions": collect_versions(),
    }
    (arguments.out / "arms.json").write_text(json.dumps(result, indent=2))
    print(json.dumps({"seed": config.seed, "tower": tower, "accuracy": accuracy}), flush=True)


if __name__ == "__main__":
    main()
