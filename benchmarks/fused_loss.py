"""The fused answer loss beside plain cross-entropy: time, scratch memory and error of its gradients.

For supervised loss alone and for supervised + reverse KL from each form of logit targets:

* time of forward and backward over that of the plain head product and ``cross_entropy``, in turns in one process, medians;
* scratch: bytes of tensors at the peak, over inputs and returned gradients (of the allocator: from the profiler's memory
  events on a CPU, ``max_memory_allocated`` on CUDA);
* error: the largest difference from autograd through the reference divergences, in float64, over the largest gradient, at
  some of the answers. (The same reference in float32 is itself off by 1e-5: it loses digits where divergences are large.)

    python benchmarks/fused_loss.py --answers 4096 --vocabulary 32000 --width 2048

Shapes: A answers, C answers of a chunk, D width, N vocabulary.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from alignkd.losses.answer_loss import answer_terms
from alignkd.targets.logits import LOGIT_CODECS, Calibration, LogitCodec, LogitSettings

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.reference.logits import divergence

CHUNK, COMPARED = 128, 512
Gradients = list[torch.Tensor]


@dataclass(frozen=True)
class Inputs:
    """A student's hidden states and output head, and labels."""

    hidden_AD: torch.Tensor
    head_ND: torch.Tensor
    labels_A: torch.Tensor

    @property
    def leaves(self) -> Gradients:
        return [self.hidden_AD.detach().requires_grad_(), self.head_ND.detach().requires_grad_()]


@dataclass(frozen=True)
class Targets:
    """A codec's; without one, supervised loss alone."""

    codec: LogitCodec | None
    values: dict[str, torch.Tensor]

    @property
    def weights(self) -> dict[str, float]:
        return {"supervised": 1.0} if self.codec is None else {"supervised": 1.0, "reverse_kl": 1.0}


def plain(inputs: Inputs) -> Gradients:
    hidden_AD, head_ND = inputs.leaves
    return gradients_of(
        functional.cross_entropy(functional.linear(hidden_AD, head_ND).float(), inputs.labels_A), [hidden_AD, head_ND]
    )


def fused(inputs: Inputs, targets: Targets) -> Gradients:
    leaves = inputs.leaves
    terms = answer_terms(
        *leaves,
        inputs.labels_A,
        weights=targets.weights,
        codec=targets.codec,
        values=targets.values,
        temperature=1.0,
        divisor=len(inputs.labels_A),
    )
    return gradients_of(terms.loss, leaves)


def reference(inputs: Inputs, targets: Targets) -> Gradients:
    """By autograd through dense losses in float64, some rows at a time to fit in memory."""
    leaves, answers = [leaf.detach().double().requires_grad_() for leaf in inputs.leaves], len(inputs.labels_A)
    total = [torch.zeros_like(leaf) for leaf in leaves]
    for start in range(0, answers, CHUNK):
        part = slice(start, start + CHUNK)
        logits_CN = functional.linear(leaves[0][part], leaves[1])
        loss = functional.cross_entropy(logits_CN, inputs.labels_A[part], reduction="sum")
        if targets.codec is not None:
            values = {name: value[part] for name, value in targets.values.items()}
            loss = loss + divergence(targets.codec, "reverse_kl", logits_CN, values, 1.0).sum()
        for sum_, gradient in zip(total, gradients_of(loss / answers, leaves), strict=True):
            sum_ += gradient
    return total


def gradients_of(loss: torch.Tensor, leaves: Gradients) -> Gradients:
    return list(torch.autograd.grad(loss, leaves))


def seconds(run: Callable[[], Gradients], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def scratch(run: Callable[[], Gradients], device: torch.device) -> int:
    """Bytes at the peak that are neither there before nor among what is returned."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        kept = run()
        peak = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        del kept
        return peak
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        kept = run()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]).cumsum(dim=0)
    del kept
    return int(live.max() - live[-1])


def error(inputs: Inputs, targets: Targets) -> float:
    few = Inputs(inputs.hidden_AD[:COMPARED], inputs.head_ND, inputs.labels_A[:COMPARED])
    of_few = Targets(targets.codec, {name: value[:COMPARED] for name, value in targets.values.items()})
    pairs = zip(fused(few, of_few), reference(few, of_few), strict=True)
    return max(float((found - expected).abs().max() / expected.abs().max()) for found, expected in pairs)


def make_inputs(arguments: argparse.Namespace, generator: torch.Generator) -> Inputs:
    """Logits with a standard deviation of about 3, as a language model's."""
    hidden_AD = torch.randn(arguments.answers, arguments.width, generator=generator)
    head_ND = 3 * torch.randn(arguments.vocabulary, arguments.width, generator=generator) / arguments.width**0.5
    labels_A = torch.randint(arguments.vocabulary, (arguments.answers,), generator=generator)
    to = {"device": arguments.device, "dtype": getattr(torch, arguments.dtype)}
    return Inputs(hidden_AD.to(**to), head_ND.to(**to), labels_A.to(arguments.device))


def make_targets(kind: str, arguments: argparse.Namespace, labels_A: torch.Tensor, generator: torch.Generator) -> Targets:
    """Of a teacher whose hidden states lie in few directions; the sketch is fitted for a narrow one: its size is the same."""
    width, device = arguments.teacher_width if kind == "hidden" else min(arguments.teacher_width, 256), arguments.device
    spread_D = 2 * torch.arange(1, width + 1).float() ** -0.5
    head_ND = torch.randn(arguments.vocabulary, width, generator=generator)
    hidden_AD, calibration_MD = (torch.randn(n, width, generator=generator) * spread_D for n in (len(labels_A), 512))
    mean_N = torch.full((arguments.vocabulary,), 1 / arguments.vocabulary)
    settings, codec_type = LogitSettings(kind), LOGIT_CODECS[kind]
    codec = codec_type(settings, codec_type.calibrate(settings, Calibration(calibration_MD, head_ND, None, mean_N))).to(device)
    uniform_AX = 1 - torch.rand(len(labels_A), settings.draws, generator=generator)
    made = []
    for start in range(0, len(labels_A), CHUNK):
        part = slice(start, start + CHUNK)
        hidden_CD, head = hidden_AD[part].to(device), head_ND.to(device)
        made.append(codec.encode(hidden_CD, hidden_CD @ head.T, labels_A[part], uniform_AX[part].to(device)))
    return Targets(codec, {name: torch.cat([values[name] for values in made]) for name in made[0]})


def measure(name: str, inputs: Inputs, targets: Targets, rounds: int) -> str:
    device, run, beside = inputs.hidden_AD.device, partial(fused, inputs, targets), partial(plain, inputs)
    off, held = error(inputs, targets), scratch(run, device)
    turns = [(seconds(run, device), seconds(beside, device)) for _ in range(rounds)]
    mine, theirs = (statistics.median(turn) for turn in zip(*turns, strict=True))
    return f"| {name} | {mine:.3f} | {theirs:.3f} | {mine / theirs:.2f} | {held / 1e6:.0f} | {off:.1e} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--teacher-width", type=int, default=2048, help="Of the hidden states of that kind of targets.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=["supervised", *LOGIT_CODECS])
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    inputs = make_inputs(arguments, generator)
    print(f"{arguments.answers} answers x {arguments.vocabulary} tokens, width {arguments.width}, {arguments.dtype}", end=", ")
    print(f"{arguments.device}, {torch.get_num_threads()} threads; plain cross-entropy takes", end=" ")
    print(f"{scratch(partial(plain, inputs), inputs.hidden_AD.device) / 1e6:.0f} MB of scratch\n")
    print("| terms | seconds | plain cross-entropy | ratio | scratch, MB | gradient error |\n|---|---|---|---|---|---|")
    for name in arguments.only:
        targets = Targets(None, {}) if name == "supervised" else make_targets(name, arguments, inputs.labels_A, generator)
        print(
            measure(name if targets.codec is None else f"supervised + reverse KL, {name}", inputs, targets, arguments.rounds),
            flush=True,
        )


if __name__ == "__main__":
    main()
