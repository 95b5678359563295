"""Codecs of attention and vision tokens: bytes a sample, error, change of each loss, focus indices kept. Markdown tables.

First a real teacher's targets, seen by students far from it and near to it; then drawn arrays of the shapes of MobileVLM V2
7B, which are synthetic: smooth random scores, a part of the attention elsewhere; vision tokens with outlying channels.

Example, after ``alignkd demo --out DEMO``:
OMP_NUM_THREADS=1 python benchmarks/target_codecs.py --teacher DEMO/teacher/student --data DEMO/data/labelled.json
--student far=DEMO/student-start --student near=DEMO/student-align-kd
(a run's folder brings its trained adapters; images are easy-VQA's unless --images is given).
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import set_seed

from alignkd.cache_store.codecs import get_codec
from alignkd.cache_store.formats.registry import get_format
from alignkd.cache_store.rows.encode import concatenate_rows, encode_row
from alignkd.cache_store.rows.row import EncodedField, Row
from alignkd.cache_store.rows.spec import CacheSpec, FieldSpec
from alignkd.inputs.batch import Batch
from alignkd.losses.recipes import Recipe
from alignkd.losses.terms import focus_mask
from alignkd.models.loading import load_vlm
from alignkd.objective import Objective, TeacherShape
from alignkd.pipeline.cache_io.targets import collate_targets
from alignkd.pipeline.config.cache_teacher import CacheTeacherConfig
from alignkd.pipeline.config.targets import TargetSettings
from alignkd.pipeline.data.easy_vqa import load_easy_vqa
from alignkd.pipeline.stage_one.shard_work import rows
from alignkd.pipeline.stage_one.teacher_stage import StageOne
from alignkd.targets.batch_targets import Targets

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from reference.codec_errors import error_bound

ATTENTION = ("exact", "float16", "int8-rows", "sqrt8", "sqrt4")
VISION = ("exact", "float16", "int8-rows", "int4-blocks")
FIELDS = {"attention": ("H", "T", "V"), "vision_tokens": ("V", "D")}
Students = Mapping[str, Objective]
Losses = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Sampled:
    """A batch with its teacher's rows."""

    batch: Batch
    rows: list[Row]


def field(name: str, codec: str) -> FieldSpec:
    return FieldSpec(name, FIELDS[name], "float32", codec)


def roundtrip(codec: str, array: np.ndarray) -> np.ndarray:
    return get_codec(codec).decode(get_codec(codec).encode(array), array.shape)


def part_bytes(codec: str, array: np.ndarray) -> int:
    return sum(part.nbytes for part in get_codec(codec).encode(array).values())


def stored_bytes(name: str, codec: str, arrays: Sequence[np.ndarray]) -> float:
    """Bytes an array in a Zarr shard, compressed."""
    spec, shard_format = CacheSpec((field(name, codec),), {}), get_format("zarr")
    made = [encode_row(spec, Row(f"{i:032x}", "", "", {name: array})) for i, array in enumerate(arrays)]
    return shard_format.field_bytes(spec, shard_format.write_shard(concatenate_rows(spec, made)))[name] / len(arrays)


def errors(codec: str, arrays: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Worst error, worst error stated, mean error."""
    found = [np.abs(roundtrip(codec, array) - array) for array in arrays]
    stated = max(float(error_bound(codec, array).max(initial=0)) for array in arrays)
    mean = sum(float(e.sum(dtype=np.float64)) for e in found) / sum(e.size for e in found)
    return max(float(e.max(initial=0)) for e in found), stated, mean


def noise(name: str, codec: str, arrays: Sequence[np.ndarray]) -> float:
    """Squared error as the losses measure it: relative to uniform attention, or to the variance of the vision tokens.

    About what the codec adds to the loss of any student.
    """
    found = []
    for array in arrays:
        error = float(np.square(roundtrip(codec, array) - array, dtype=np.float64).mean())
        found.append(error * array.shape[2] ** 2 if name == "attention" else error / float(array.var(dtype=np.float64)))
    return float(np.mean(found))


def focus_kept(codec: str, arrays: Sequence[np.ndarray], k: int) -> float:
    """Share of the k focus indices of each sample that are the same after the codec."""
    shares = []
    for array in arrays:
        mask = torch.ones(1, array.shape[2], dtype=torch.bool)
        exact, coded = (focus_mask(torch.from_numpy(a)[None], mask, k) for a in (array, roundtrip(codec, array)))
        shares.append(float((exact & coded).sum() / exact.sum()))
    return float(np.mean(shares))


def sampled_batches(arguments: argparse.Namespace) -> list[Sampled]:
    """The teacher's exact targets of samples spread over the data; those without an image are left out."""
    settings = TargetSettings(("attention", "vision"), attention_codec="exact", vision_codec="exact")
    config = CacheTeacherConfig(
        teacher=str(arguments.teacher),
        data=str(arguments.data),
        images=str(arguments.images or load_easy_vqa().root),
        cache="memory://not-written",
        settings=settings,
        batch_tokens=arguments.batch_tokens,
    )
    stage = StageOne.open(config)
    chosen = np.linspace(0, stage.plan.samples - 1, min(arguments.samples, stage.plan.samples)).astype(int).tolist()
    work = stage.batch_samples(0, chosen)
    found = []
    for items in work.batches:
        ready = stage.load([item for item in items if item.sample.images])
        if ready.batch is not None:
            found.append(Sampled(ready.batch, rows(ready, stage.run(ready))))
    return found


def load_objective(folder: Path, sampled: Sequence[Sampled], focus_k: int) -> Objective:
    """A student with adapters to the teacher: of a run's last checkpoint, or as a run starts them."""
    values = sampled[0].rows[0].values
    shape = TeacherShape(values["attention"].shape[0], values["vision_tokens"].shape[1])
    checkpoints = sorted(folder.glob("checkpoints/checkpoint-*"), key=lambda p: int(p.name.rsplit("-", 1)[1]))
    set_seed(0)
    recipe = Recipe("alignment", attention=0.1, vision=1.0, focus_k=focus_k)
    objective = Objective(load_vlm(folder / "student" if checkpoints else folder), recipe, shape)
    if checkpoints:
        objective.load_state_dict(load_file(checkpoints[-1] / "model.safetensors"))
    return objective.eval()


def coded_targets(sampled: Sampled, codecs: Mapping[str, str]) -> Targets:
    """The targets of a batch as stage two gets them."""
    fields = {name: field(name, codec) for name, codec in codecs.items()}
    stored = [
        {n: EncodedField(f, row.values[n].shape, get_codec(f.codec).encode(row.values[n])) for n, f in fields.items()}
        for row in sampled.rows
    ]
    return collate_targets([row.values for row in sampled.rows], stored, sampled.batch)


@torch.no_grad()
def losses(objective: Objective, sampled: Sequence[Sampled], attention: str, vision: str) -> dict[str, float]:
    """Each alignment loss over all samples."""
    codecs = {"attention": attention, "vision_tokens": vision}
    sums = dict.fromkeys(("attention", "vision_all", "vision_focus"), 0.0)
    for one in sampled:
        terms = objective(one.batch, coded_targets(one, codecs))
        for name in sums:
            sums[name] += float(terms[name]) * len(one.rows)
    return {name: value / sum(len(one.rows) for one in sampled) for name, value in sums.items()}


def changes(objective: Objective, sampled: Sequence[Sampled], exact: Mapping[str, float], **codecs: str) -> dict[str, str]:
    """Change of each loss in per cent."""
    found = losses(objective, sampled, **{"attention": "exact", "vision": "exact", **codecs})
    return {name: f"{100 * (found[name] / exact[name] - 1):+.3f} %" for name in exact}


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    print()
    for line in (head, ["---"] * len(head), *lines):
        print("| " + " | ".join(line) + " |")


def measured(name: str, codec: str, arrays: Sequence[np.ndarray]) -> list[str]:
    """Name of the codec, bytes, and errors, as the tables begin."""
    worst, stated, mean = errors(codec, arrays)
    size, squared = stored_bytes(name, codec, arrays), noise(name, codec, arrays)
    return [f"`{codec}`", f"{size:,.0f}", f"{worst:.2g} ({stated:.2g})", f"{mean:.2g}", f"{squared:.1e}"]


def real_tables(arguments: argparse.Namespace) -> None:
    sampled = sampled_batches(arguments)
    every = [row for one in sampled for row in one.rows]
    attention = [row.values["attention"] for row in every]
    vision = list({row.image_sha256: row.values["vision_tokens"] for row in every}.values())
    pairs = [text.partition("=")[::2] for text in arguments.student]
    ks = [k for k in arguments.focus if k < attention[0].shape[2]]
    students = {name: load_objective(Path(folder), sampled, ks[-1]) for name, folder in pairs}
    exact = {name: losses(student, sampled, "exact", "exact") for name, student in students.items()}
    shapes = f"attention {list(attention[0].shape)}, vision tokens {list(vision[0].shape)}"
    print(f"\nReal teacher: {len(every)} samples, {len(vision)} images, first sample: {shapes}.")
    for name, found in exact.items():
        print(f"Losses of the {name} student:", ", ".join(f"{loss} {value:.4f}" for loss, value in found.items()))
    attention_table(attention, students, sampled, exact, ks)
    vision_table(vision, students, sampled, exact)


def attention_table(
    arrays: Sequence[np.ndarray], students: Students, sampled: Sequence[Sampled], exact: Losses, ks: Sequence[int]
) -> None:
    means = [array.mean(0, keepdims=True) for array in arrays]
    lines = []
    for codec in ATTENTION:
        line = measured("attention", codec, arrays)
        for name, student in students.items():
            found = changes(student, sampled, exact[name], attention=codec)
            line += [found["attention"], found["vision_focus"]]
        lines.append(line + [f"{focus_kept(codec, kind, k):.2%}" for k in ks for kind in (arrays, means)])
    head = ["attention", "bytes a sample, stored", "worst error (stated)", "mean error", "noise"]
    head += [f"{loss} loss, {name}" for name in students for loss in ("attention", "vision_focus")]
    table(head + [f"top-{k} kept{kind}" for k in ks for kind in ("", ", head mean")], lines)


def vision_table(arrays: Sequence[np.ndarray], students: Students, sampled: Sequence[Sampled], exact: Losses) -> None:
    lines = []
    for codec in VISION:
        line = measured("vision_tokens", codec, arrays)
        for name, student in students.items():
            found = changes(student, sampled, exact[name], vision=codec)
            line += [found["vision_all"], found["vision_focus"]]
        lines.append(line)
    head = ["vision tokens", "bytes an image, stored", "worst error (stated)", "mean error", "noise"]
    table(head + [f"{loss} loss, {name}" for name in students for loss in ("vision_all", "vision_focus")], lines)


def drawn_attention(generator: torch.Generator, heads: int = 32, text: int = 200, side: int = 12) -> np.ndarray:
    """Synthetic: the softmax of scores that change slowly over text and image, sharper in later heads; a part elsewhere."""
    coarse = torch.randn(heads, 1, text // 10, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (text, side, side), mode="trilinear", align_corners=False)
    noisy = smooth.view(heads, text, side**2) + 0.3 * torch.randn(heads, text, side**2, generator=generator)
    elsewhere = 0.2 + 0.6 * torch.rand(heads, text, 1, generator=generator)
    return ((noisy * torch.linspace(0.5, 5, heads)[:, None, None]).softmax(2) * elsewhere).numpy()


def drawn_tokens(generator: torch.Generator, tokens: int = 144, width: int = 4096) -> np.ndarray:
    """Synthetic: normal numbers, channels of log-normal size and a few ten times as large."""
    sizes = torch.randn(width, generator=generator).mul(0.5).exp()
    sizes[torch.randperm(width, generator=generator)[: width // 500]] *= 10
    return (torch.randn(tokens, width, generator=generator) * sizes).numpy()


def milliseconds(function: Callable[[], object]) -> str:
    """The best of five."""
    taken = []
    for _ in range(5):
        started = time.perf_counter()
        function()
        taken.append(time.perf_counter() - started)
    return f"{1000 * min(taken):.1f}"


def drawn_tables(count: int = 8) -> None:
    generator = torch.Generator().manual_seed(0)
    heads = [drawn_attention(generator) for _ in range(count)]
    tokens = [drawn_tokens(generator) for _ in range(count)]
    kinds = {
        "attention, 32 x 200 x 144": ("attention", heads, ATTENTION),
        "attention, head mean, 1 x 200 x 144": ("attention", [array.mean(0, keepdims=True) for array in heads], ATTENTION),
        "vision tokens, 144 x 4096": ("vision_tokens", tokens, VISION),
    }
    lines = []
    for title, (name, arrays, codecs) in kinds.items():
        for codec in codecs:
            kept = f"{focus_kept(codec, arrays, 16):.2%}" if name == "attention" else ""
            sizes = [f"{part_bytes(codec, arrays[0]):,}", f"{stored_bytes(name, codec, arrays):,.0f}"]
            parts = get_codec(codec).encode(arrays[0])
            times = [
                milliseconds(partial(get_codec(codec).encode, arrays[0])),
                milliseconds(partial(get_codec(codec).decode, parts, arrays[0].shape)),
            ]
            lines.append([title, f"`{codec}`", *sizes, f"{noise(name, codec, arrays):.1e}", kept, *times])
    head = ["synthetic", "codec", "bytes (as moved to the device)", "stored", "noise", "top-16 kept"]
    table([*head, "ms to encode", "ms to decode on the host"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--student", action="append", default=[], help="NAME=FOLDER of a checkpoint or a run")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument(
        "--focus", type=int, nargs="+", default=[4, 16], help="k of the focus; the losses take the last below V"
    )
    parser.add_argument("--batch-tokens", type=int, default=4096)
    arguments = parser.parse_args()
    real_tables(arguments)
    drawn_tables()


if __name__ == "__main__":
    main()
