"""A student that sees through its teacher's projector: steps from cached vision tokens against steps that run the tower.

Kinds of steps: ``sft`` and ``align-kd, cached`` as in :mod:`steps`; ``seen, tower``: align-kd without its vision term, through
the teacher's projector, with pixels and tower; ``seen, cached``: the same from 8-bit vision tokens, no pixels, no tower. CPU
seconds of a process, kinds in turns; medians, and the median of the ratios in the same round. FLOPs of the true size are
computed from the numbers of parameters: 2 for each number and position forward, 4 more backward where it trains.

Example: OMP_NUM_THREADS=1 python benchmarks/cached_tokens.py --after 200
"""

import argparse
import statistics
import time
from dataclasses import replace

import torch
from shapes import AFTER, ANSWERS, BEFORE, STUDENT, TEACHER, VISION_TOKENS, batch_of, config, make_vlm, scaled
from steps import Setting, Steps, median_ratio

from alignkd.inputs.batch import Batch
from alignkd.models.families.mobilevlm import MobileVlm
from alignkd.models.modules.ldpv2 import LdpV2Projector
from alignkd.models.tower_aside import AbsentTower
from alignkd.targets.batch_targets import Targets

KINDS = ("sft", "align-kd, cached", "seen, tower", "seen, cached")
PATCHES = (336 // 14) ** 2


def steps_of(kind: str, setting: Setting) -> Steps:
    student = make_vlm(STUDENT, setting.scale, setting.device)
    if not kind.startswith("seen"):
        return Steps(kind, student, setting)
    width = scaled(TEACHER, setting.scale)["hidden_size"]
    tower = student.model.config.vision_config.hidden_size
    student.see_through(LdpV2Projector(tower, width), {"projector_type": "ldpnetv2", "projector_grid": 12}, width)
    found = Steps("align-kd, cached", student, setting, {"projector": "teacher", "vision": "0"})
    if kind == "seen, cached":
        student.model.set_submodule("model.vision_tower", AbsentTower())
    return found


def inputs_of(kind: str, steps: Steps, batch: Batch) -> tuple[Batch, Targets]:
    targets = steps.targets(batch)
    if kind == "seen, cached":
        return replace(batch, images=torch.zeros(0)), targets
    return batch, replace(targets, vision_BVD=None) if kind == "seen, tower" else targets


def cpu_seconds(steps: Steps, batch: Batch, targets: Targets) -> float:
    started = time.process_time()
    steps.step(batch, targets)
    return time.process_time() - started


def teraflops(positions: int) -> tuple[float, float]:
    """Of the tower forward, and of the student forward and backward, a sample at the true size."""
    with torch.device("meta"):
        model = MobileVlm(config(STUDENT, 1))
    parts = (model.model.vision_tower, model.model.language_model.layers, model.lm_head)
    tower, text, head = (sum(p.numel() for p in part.parameters()) for part in parts)
    return 2e-12 * tower * PATCHES, 6e-12 * (text * positions + head * ANSWERS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--after", type=int, default=AFTER, help="Tokens of text after the image, half of them supervised.")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    setting = Setting(arguments.scale, "cpu", torch.float32)
    batch = batch_of(arguments.batch, after=arguments.after, answers=arguments.after * ANSWERS // AFTER)
    ready = {}
    for kind in KINDS:
        steps = steps_of(kind, setting)
        ready[kind] = (steps, *inputs_of(kind, steps, batch))
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(arguments.rounds + 1):
        for kind, given in ready.items():
            spent = cpu_seconds(*given)
            if number:
                taken[kind].append(spent)
    print("| step | CPU seconds | over align-kd, cached | weights in memory, MB |\n|---|---|---|---|")
    for kind, spent in taken.items():
        held = sum(p.numel() * 4 for p in ready[kind][0].objective.parameters()) / 1e6
        ratio = median_ratio(spent, taken["align-kd, cached"])
        print(f"| {kind} | {statistics.median(spent):.3f} | {ratio:.3f} | {held:,.0f} |")
    tower, student = teraflops(BEFORE + VISION_TOKENS + arguments.after)
    faster = (tower + student) / student
    print(f"\ntrue size, a sample: tower {tower:.2f} TFLOP, student {student:.2f}; without the tower {faster:.2f} x")


if __name__ == "__main__":
    main()
