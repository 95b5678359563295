"""What recomputing attention and vision tokens from the teacher's slice costs, beside the student's training step.

1. Floating-point operations of both at the shapes of MobileVLM V2 7B and 1.7B, counted on the meta device. 2. Time of both
with all widths divided by ``--scale`` and random weights. 3. Bytes of the slice, and of the rows beside it.

A sample has one image (336 x 336, 144 vision tokens), 40 text tokens before it and 200 after, the last 100 of them supervised.
The step is forward and backward of all Align-KD terms with given targets, without the optimizer.

Example: python benchmarks/slice_cost.py
On a GPU, at the true size: --scale 1 --batch 8 --device cuda --dtype bfloat16
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from shapes import (
    AFTER,
    ANSWERS,
    BEFORE,
    STUDENT,
    TEACHER,
    VOCABULARY,
    batch_of,
    built_on,
    config,
    describe_teacher,
    make_slice,
    make_vlm,
    scaled,
    token_ids,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils.generic import maybe_autocast

from alignkd.cache_store.formats.registry import get_format
from alignkd.cache_store.rows.encode import concatenate_rows, encode_row
from alignkd.cache_store.rows.row import Row
from alignkd.cache_store.rows.spec import CacheSpec
from alignkd.capture.teacher_slice import TOWER, slice_sizes
from alignkd.inputs.batch import Batch
from alignkd.inputs.prompts import IGNORE, IMAGE_TOKEN_ID
from alignkd.losses.recipes import get_recipe
from alignkd.models.modules.mobilevlm import MobileVlm
from alignkd.objective import Objective, TeacherShape
from alignkd.pipeline.cache_io.targets import row_fields
from alignkd.pipeline.config.targets import TargetSettings
from alignkd.pipeline.runtime.devices import parse_dtype, pick_device
from alignkd.pipeline.runtime.run_record import collect_versions
from alignkd.targets.batch_targets import Targets
from alignkd.targets.logits import LogitSettings
from alignkd.targets.logits.topk import TopK

KEPT = 64
SAMPLES = 665_000


class Case:
    """Student, slices and one batch of a shape, on a device."""

    def __init__(self, scale: int, samples: int, device: str, dtype: torch.dtype) -> None:
        self.own_tower = make_slice(scale, device, dtype, tower=True)
        self.shared = make_slice(scale, device, dtype)
        vlm = make_vlm(STUDENT, scale, device)
        heads, width = scaled(TEACHER, scale)["num_attention_heads"], scaled(TEACHER, scale)["hidden_size"]
        ids = torch.arange(VOCABULARY, dtype=torch.int32, device=device)
        codec = TopK(LogitSettings("topk", top_k=KEPT), {"id_of_rank": ids})
        self.objective = Objective(vlm, get_recipe("align-kd"), TeacherShape(heads, width), logit_codec=codec).train()
        host = batch_of(samples)
        self.counts, self.batch = host.counts(), host.to(device)
        self.targets = targets_of(self.batch, heads, width)
        with torch.no_grad():
            features = vlm.model.model.run_tower(self.batch.images)
        self.with_features = replace(self.batch, images=features)
        kind = torch.device(device).type
        self.autocast = maybe_autocast(kind, dtype, enabled=dtype != torch.float32)

    def step(self) -> None:
        self.objective.zero_grad()
        with self.autocast:
            loss = self.objective(self.batch, self.targets, self.counts)["loss"]
        loss.backward()

    def slice_shared(self) -> None:
        self.shared.targets(self.with_features)

    def slice_own_tower(self) -> None:
        self.own_tower.targets(self.batch)


def targets_of(batch: Batch, heads: int, width: int) -> Targets:
    device, answers = batch.input_ids_BS.device, batch.answer_ids_A.shape[0]
    rows, columns = batch.text_rows_BT.shape[1], batch.vision_columns_BV.shape[1]
    return Targets(
        {0: torch.full((batch.samples, heads, rows, columns), 1 / columns, device=device)},
        torch.randn(batch.samples, columns, width, device=device),
        {
            "topk_rank_steps": torch.ones(answers, KEPT, dtype=torch.int32, device=device),
            "topk_logprob_codes": torch.full((answers, KEPT), 40, dtype=torch.uint8, device=device),
            "tail_logmass": torch.full((answers,), -1.0, device=device),
        },
    )


def flops(function: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())


def seconds(function: Callable[[], None], device: str) -> float:
    started = time.perf_counter()
    function()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def count_flops() -> None:
    case = Case(1, 1, "meta", torch.bfloat16)
    # A ready mask: transformers would ask a compact one whether it is full, which nothing on the meta device can answer.
    length = case.batch.input_ids_BS.shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device="meta")
    decoder = case.objective.student.model.language_model
    decoder.register_forward_pre_hook(lambda _, a, k: (a, {**k, "attention_mask": mask}), with_kwargs=True)
    step, shared, own = flops(case.step), flops(case.slice_shared), flops(case.slice_own_tower)
    print("\n| a sample, 7B teacher, 1.7B student | GFLOP | of the step |\n|---|---|---|")
    print(f"| training step (forward and backward, tower forward) | {step / 1e9:,.0f} | |")
    print(f"| slice, tower shared | {shared / 1e9:,.1f} | {shared / step:.1%} |")
    print(f"| slice with a tower of its own | {own / 1e9:,.0f} | {own / step:.1%} |")


def measure(arguments: argparse.Namespace) -> None:
    device, dtype = pick_device(arguments.device), parse_dtype(arguments.dtype)
    case = Case(arguments.scale, arguments.batch, device, dtype)
    functions = {
        "training step": case.step,
        "slice, tower shared": case.slice_shared,
        "slice with a tower of its own": case.slice_own_tower,
    }
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(arguments.rounds + 1):
        for name, function in functions.items():
            spent = seconds(function, device)
            if number:  # the first round warms up
                taken[name].append(spent)
    step = statistics.median(taken["training step"])
    widths = f"widths / {arguments.scale}, batch {arguments.batch}, {arguments.dtype}, {device}"
    print(f"\n| {widths}, median of {arguments.rounds} | seconds | of the step | slowest and fastest |\n|---|---|---|---|")
    for name, times in taken.items():
        median = statistics.median(times)
        print(f"| {name} | {median:.4f} | {median / step:.1%} | {min(times):.4f} to {max(times):.4f} |")


def count_bytes() -> None:
    with built_on("meta"):
        teacher = MobileVlm(config(TEACHER, 1))
    sizes = slice_sizes(describe_teacher(1))
    whole = sum(parameter.numel() for parameter in teacher.parameters())
    print(f"\n| kept once a cache, 16 bits | MB | share of {whole / 1e9:.2f} G parameters | bytes a sample of {SAMPLES:,} |")
    print("|---|---|---|---|")
    for name, groups in (
        ("projector, embeddings, norm, q and k", set(sizes) - {TOWER}),
        ("the same with the tower", set(sizes)),
    ):
        size = sum(sizes[group] for group in groups)
        print(f"| {name} | {2 * size / 1e6:,.0f} | {size / whole:.1%} | {2 * size / SAMPLES:,.0f} |")
    print(f"\nids and labels of a row: {row_bytes():,.0f} bytes (Zipf-distributed ids, 512 rows a zarr shard)")


def row_bytes(rows: int = 512) -> float:
    spec = CacheSpec(row_fields(TargetSettings(targets=(), cross_model=False), VOCABULARY), {})
    generator = np.random.default_rng(0)
    encoded = []
    for number in range(rows):
        ids = np.concatenate([token_ids(generator, BEFORE), [IMAGE_TOKEN_ID], token_ids(generator, AFTER)]).astype(np.int32)
        labels = np.where(np.arange(len(ids)) < len(ids) - ANSWERS, np.int32(IGNORE), ids)
        row = Row(f"{number:032x}", f"sample{number}", f"{number:064x}", {"input_ids": ids, "labels": labels})
        encoded.append(encode_row(spec, row))
    return len(get_format("zarr").write_shard(concatenate_rows(spec, encoded))) / rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=int, default=2, help="Divides all widths of the timed models; 1 is the true size.")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device")
    arguments = parser.parse_args()
    found = collect_versions()
    print(
        f"torch {found['torch']}, transformers {found['transformers']}, {found['platform']}, {torch.get_num_threads()} threads"
    )
    count_flops()
    count_bytes()
    measure(arguments)


if __name__ == "__main__":
    main()
