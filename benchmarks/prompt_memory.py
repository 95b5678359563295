"""Peak memory of a training step against the length of the prompt, for each kind of step, and its growth beside ``sft``'s.

One sample with one image; half of the text after it is supervised. Kinds of steps are told in :mod:`steps`; all tensors count,
weights, gradients and optimizer included. ``--no-optimizer`` leaves out the optimizer, under whose peak that of a short
prompt can hide: as where its state is kept elsewhere.

Example: python benchmarks/prompt_memory.py
On a GPU, at the true size: --scale 1 --device cuda --dtype bfloat16
"""

import argparse
from functools import partial

from shapes import BEFORE, VISION_TOKENS, batch_of
from steps import KINDS, Setting, alone, peak_bytes

from alignkd.pipeline.runtime.devices import parse_dtype, pick_device
from alignkd.pipeline.runtime.run_record import collect_versions


def peaks(kind: str, lengths: list[int], setting: Setting, *, checkpointing: bool, optimizer: bool) -> list[int]:
    steps, found = alone(kind, setting), []
    if checkpointing:
        steps.objective.recompute_activations()
    for number, length in enumerate([lengths[0], *lengths]):
        after = length - BEFORE - VISION_TOKENS
        batch = batch_of(1, after=after, answers=after // 2)
        step = partial(steps.step, batch, steps.targets(batch), update=optimizer)
        if number == 0:  # the optimizer's state comes with the first step
            step()
        else:
            found.append(peak_bytes(step, on_cuda=setting.on_cuda))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=int, default=4, help="Divides all widths; 1 is the true size.")
    parser.add_argument("--lengths", type=int, nargs="*", default=[256, 512, 1024, 2048])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device")
    parser.add_argument("--only", nargs="*", default=list(KINDS), choices=KINDS)
    parser.add_argument("--checkpointing", choices=["without", "with", "both"], default="both")
    parser.add_argument("--no-optimizer", action="store_true")
    arguments = parser.parse_args()
    setting = Setting(arguments.scale, pick_device(arguments.device), parse_dtype(arguments.dtype))
    found, lengths = collect_versions(), arguments.lengths
    print(f"torch {found['torch']}, {found['platform']}, {setting.device}, {arguments.dtype}, widths / {arguments.scale}")
    kinds = ["sft", *(kind for kind in arguments.only if kind != "sft")]
    for checkpointing in {"without": [False], "with": [True], "both": [False, True]}[arguments.checkpointing]:
        print(f"\n{'With' if checkpointing else 'Without'} gradient checkpointing,", end=" ")
        print(f"{'without' if arguments.no_optimizer else 'with'} the optimizer; peak in MB at positions\n")
        print(f"| step | {' | '.join(f'{n:,}' for n in lengths)} | over sft, longest | growth | less sft's |")
        print("|---" * (len(lengths) + 4) + "|")
        base: list[int] = []
        for kind in kinds:
            mine = peaks(kind, lengths, setting, checkpointing=checkpointing, optimizer=not arguments.no_optimizer)
            base = base or mine
            growth, theirs = mine[-1] - mine[0], base[-1] - base[0]
            cells = [f"{size / 1e6:,.0f}" for size in mine]
            last = [f"{mine[-1] / base[-1]:.3f}", f"{growth / 1e6:,.0f}", f"{(growth - theirs) / 1e6:+,.0f}"]
            print(f"| {kind} | {' | '.join(cells + last)} |", flush=True)


if __name__ == "__main__":
    main()
