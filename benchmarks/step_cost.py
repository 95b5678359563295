"""What a step of stage two costs beside plain fine-tuning of the same student on the same batch: time and peak memory.

Kinds of steps are told in :mod:`steps`. Times are taken in turns in one process: medians, and the median of the ratios to
``sft`` in the same round. Memory is that of each kind alone: all tensors at the peak of its second step, weights,
gradients and optimizer included (of the allocator: from the profiler on a CPU, ``max_memory_allocated`` on CUDA).

Example: OMP_NUM_THREADS=2 python benchmarks/step_cost.py
On a GPU, at the true size: --scale 1 --batch 16 --device cuda --dtype bfloat16
"""

import argparse
import statistics
from functools import partial

from shapes import AFTER, ANSWERS, BEFORE, STUDENT, batch_of, make_vlm
from steps import KINDS, Setting, Steps, alone, median_ratio, peak_bytes, seconds_in_turns

from alignkd.inputs.batch import Batch
from alignkd.pipeline.runtime.devices import parse_dtype, pick_device
from alignkd.pipeline.runtime.run_record import collect_versions


def times(kinds: list[str], batch: Batch, setting: Setting, rounds: int) -> dict[str, list[float]]:
    student = make_vlm(STUDENT, setting.scale, setting.device)
    functions = {}
    for kind in kinds:
        steps = Steps(kind, student, setting)
        functions[kind] = partial(steps.step, batch, steps.targets(batch))
    return seconds_in_turns(functions, rounds, on_cuda=setting.on_cuda)


def peak(kind: str, batch: Batch, setting: Setting) -> int:
    steps = alone(kind, setting)
    step = partial(steps.step, batch, steps.targets(batch))
    step()
    return peak_bytes(step, on_cuda=setting.on_cuda)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=int, default=4, help="Divides all widths; 1 is the true size.")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--after", type=int, default=AFTER, help="Tokens of text after the image, half of them supervised.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device")
    parser.add_argument("--only", nargs="*", default=list(KINDS), choices=KINDS)
    parser.add_argument("--no-time", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    arguments = parser.parse_args()
    setting = Setting(arguments.scale, pick_device(arguments.device), parse_dtype(arguments.dtype))
    batch = batch_of(arguments.batch, after=arguments.after, answers=arguments.after * ANSWERS // AFTER)
    kinds = ["sft", *(kind for kind in arguments.only if kind != "sft")]
    taken = {} if arguments.no_time else times(kinds, batch, setting, arguments.rounds)
    peaks = {} if arguments.no_memory else {kind: peak(kind, batch, setting) for kind in kinds}
    found = collect_versions()
    print(
        f"torch {found['torch']}, {found['platform']}, {setting.device}, {arguments.dtype}, widths / {arguments.scale},",
        end=" ",
    )
    print(f"{arguments.batch} samples of an image and {BEFORE} + {arguments.after} tokens, {arguments.rounds} rounds\n")
    print("| step | seconds | fastest to slowest | over sft | peak, MB | over sft |\n|---|---|---|---|---|---|")
    for kind in kinds:
        cells = ["", "", ""]
        if spent := taken.get(kind):
            ratio = median_ratio(spent, taken["sft"])
            cells = [f"{statistics.median(spent):.3f}", f"{min(spent):.3f} to {max(spent):.3f}", f"{ratio:.3f}"]
        memory = [f"{peaks[kind] / 1e6:,.0f}", f"{peaks[kind] / peaks['sft']:.3f}"] if peaks else ["", ""]
        print(f"| {kind} | {' | '.join(cells + memory)} |")


if __name__ == "__main__":
    main()
