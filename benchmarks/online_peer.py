"""A student trained from cached targets beside the same student with the teacher in the loop: samples/s and peak memory.

The teacher's decoder has 3.9 times the parameters of the student's, so that arithmetic alone allows 2.3 times the samples/s
where nothing else takes time; both share one frozen vision tower, which takes the same time on both sides
(``--tower-features``: it has run before, as with ``--cache-tower-features``). Kinds of steps are told in :mod:`steps`.

Example: OMP_NUM_THREADS=2 python benchmarks/online_peer.py
On a GPU, at the true size: --scale 1 --batch 16 --device cuda --dtype bfloat16
"""

import argparse
import statistics
from functools import partial

from shapes import AFTER, ANSWERS, BEFORE, STUDENT, batch_of, make_vlm
from steps import KINDS, ONLINE, ONLINE_SHAPE, Setting, Steps, alone, median_ratio, peak_bytes, seconds_in_turns, with_features

from alignkd.inputs.batch import Batch
from alignkd.models.vlm import Vlm
from alignkd.pipeline.runtime.devices import parse_dtype, pick_device
from alignkd.pipeline.runtime.run_record import collect_versions


def make_batch(arguments: argparse.Namespace, student: Vlm) -> Batch:
    batch = batch_of(arguments.batch, after=arguments.after, answers=arguments.after * ANSWERS // AFTER)
    return with_features(student, batch) if arguments.tower_features else batch


def times(kinds: list[str], arguments: argparse.Namespace, setting: Setting) -> dict[str, list[float]]:
    student = make_vlm(STUDENT, setting.scale, setting.device)
    batch, functions = make_batch(arguments, student), {}
    for kind in kinds:
        steps = Steps(kind, student, setting)
        functions[kind] = partial(steps.step, batch, steps.targets(batch))
    return seconds_in_turns(functions, arguments.rounds, on_cuda=setting.on_cuda)


def peak(kind: str, arguments: argparse.Namespace, setting: Setting) -> int:
    steps = alone(kind, setting)
    batch = make_batch(arguments, steps.student)
    step = partial(steps.step, batch, steps.targets(batch))
    step()
    return peak_bytes(step, on_cuda=setting.on_cuda)


def decoder_ratio(scale: int) -> float:
    sizes = []
    for shape in (ONLINE_SHAPE, STUDENT):
        layers = make_vlm(shape, scale, "meta").model.model.language_model.layers
        sizes.append(sum(parameter.numel() for parameter in layers.parameters()))
    return sizes[0] / sizes[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=int, default=4, help="Divides all widths; 1 is the true size.")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--after", type=int, default=AFTER, help="Tokens of text after the image, half of them supervised.")
    parser.add_argument("--tower-features", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device")
    arguments = parser.parse_args()
    setting = Setting(arguments.scale, pick_device(arguments.device), parse_dtype(arguments.dtype))
    kinds = [ONLINE, *(kind for kind in KINDS if kind != "plain")]
    taken = times(kinds, arguments, setting)
    peaks = {kind: peak(kind, arguments, setting) for kind in kinds}
    found = collect_versions()
    print(
        f"torch {found['torch']}, {found['platform']}, {setting.device}, {arguments.dtype}, widths / {arguments.scale},",
        end=" ",
    )
    print(f"{arguments.batch} samples of an image and {BEFORE} + {arguments.after} tokens, {arguments.rounds} rounds,", end=" ")
    tower = "has run before" if arguments.tower_features else "runs in the step"
    print(f"decoders {decoder_ratio(setting.scale):.2f} : 1, the tower {tower}\n")
    print("| step | samples/s | of online | peak, MB | of sft |\n|---|---|---|---|---|")
    for kind in kinds:
        rate, times_online = arguments.batch / statistics.median(taken[kind]), median_ratio(taken[ONLINE], taken[kind])
        print(f"| {kind} | {rate:.2f} | {times_online:.2f} x | {peaks[kind] / 1e6:,.0f} | {peaks[kind] / peaks['sft']:.3f} |")


if __name__ == "__main__":
    main()
