"""Share of a run's time that the training loop waits for data, with a few loader processes.

1. The demo's shapes: easy-VQA's images of 64 x 64, a cache of real targets of the demo's (untrained) teacher, and the demo's
student computing a real step on the same cores. 2. Photographs: JPEGs of 640 x 480, preprocessed to 336 x 336, rows of 50 to
200 kB, and a step that sleeps: it would be a GPU's. The run goes from one window of shards into the next.

The first batch of a run does not count. ``loading_cpu_ms`` is the processor time of loading one batch: over ``step_ms``, it is
the number of cores that the loaders must have for themselves; with fewer no loader keeps up.

Example: OMP_NUM_THREADS=1 python benchmarks/data_wait.py --folder /scratch/data-wait
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPVisionModel

from alignkd.cache_store.protocol.plan import Plan
from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.cache_store.protocol.store import CacheStore
from alignkd.cache_store.rows.row import Row
from alignkd.cache_store.rows.spec import CacheSpec
from alignkd.losses.recipes import get_recipe
from alignkd.models.encoders.images import ImagePreprocessor
from alignkd.models.loading import load_vlm
from alignkd.models.vlm import Vlm
from alignkd.objective import Objective, TeacherShape
from alignkd.pipeline.cache_io.logits import open_codec, settings_of
from alignkd.pipeline.cache_io.targets import row_fields
from alignkd.pipeline.config.cache_teacher import CacheTeacherConfig
from alignkd.pipeline.config.demo import DemoConfig
from alignkd.pipeline.config.targets import TargetSettings
from alignkd.pipeline.data.easy_vqa import few_labelled, load_easy_vqa, write_llava
from alignkd.pipeline.data.preparer import Preparer
from alignkd.pipeline.data.samples import SampleFile
from alignkd.pipeline.demo.checkpoints import new_checkpoint, train_tokenizer
from alignkd.pipeline.demo.tower import tower_config
from alignkd.pipeline.feeding.batch_loader import TrainingLoader
from alignkd.pipeline.feeding.dataset import TrainingSet
from alignkd.pipeline.feeding.feature_cache import cache_tower_features
from alignkd.pipeline.feeding.order import WINDOW_SHARDS, BatchOrder, StepSampler
from alignkd.pipeline.stage_one.worker import cache_teacher

STUDENT = Path(__file__).parents[1] / "tests" / "data" / "mobilevlm_v2_tiny" / "student"
HEADS, WIDTH, PHOTOS, SHARD_SAMPLES = 6, 64, 512, 512
CLIP_336 = {
    "size": {"shortest_edge": 336},
    "crop_size": {"height": 336, "width": 336},
    "resample": 3,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
ALL = frozenset({"attention", "vision", "logits"})

Step = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Case:
    """What is read, and what is done with each batch."""

    name: str
    data: TrainingSet
    batch_size: int
    step: Step


def training_set(vlm: Vlm, data: Path, images: Path, cache: Path) -> TrainingSet:
    preparer = Preparer.of(vlm, template="v1", max_length=2048, image_root=images, with_spans=False)
    reader = CacheReader(cache, max_shards=2 * WINDOW_SHARDS)
    return TrainingSet(SampleFile(data), preparer, student=vlm, reader=reader, needs=ALL, max_rejected=0)


def demo_cases(folder: Path) -> list[Case]:
    config, data = DemoConfig(str(folder)), load_easy_vqa()
    labelled, teacher, student = folder / "labelled.json", folder / "teacher", folder / "student"
    if not student.exists():
        folder.mkdir(parents=True)
        write_llava(few_labelled(data.train, config.labelled_share, config.seed), labelled)
        tokenizer, tower = train_tokenizer(data.train, folder / "tokenizer"), CLIPVisionModel(tower_config(config.tower))
        new_checkpoint(tokenizer, tower, config.teacher, teacher)
        new_checkpoint(tokenizer, tower, config.student, student)
    cache_teacher(
        CacheTeacherConfig(
            teacher=str(teacher),
            data=str(labelled),
            images=str(data.root),
            cache=str(folder / "cache"),
            settings=config.targets,
            shard_samples=256,
            device="cpu",
        )
    )
    cases = []
    for name, samples, features in (("images", 16, False), ("images", 128, False), ("tower features", 128, True)):
        vlm = load_vlm(student)
        found = training_set(vlm, labelled, data.root, folder / "cache")
        if features:
            cache_tower_features(vlm, found, limit_bytes=2**32)
        cases.append(Case(f"demo, {name}", found, samples, student_step(vlm, found, config)))
    return cases


def student_step(vlm: Vlm, data: TrainingSet, config: DemoConfig) -> Step:
    """Forward, backward and update of the demo's student."""
    assert data.reader is not None
    codec = open_codec(settings_of(data.reader.fingerprint), data.reader.tensors, "cpu")
    shape = TeacherShape(config.teacher.heads, config.teacher.hidden_size)
    recipe = get_recipe("align-kd", {"focus_k": str(config.focus_k)})
    objective = Objective(vlm, recipe, shape, logit_codec=codec)
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-4)

    def step(found: dict[str, Any]) -> None:
        objective(found["batch"], found["targets"])["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def photo_cases(folder: Path, samples: int, seconds: float, batch_sizes: list[int]) -> list[Case]:
    # The tiny student's own images are of 48 x 48.
    vlm, data = replace(load_vlm(STUDENT), images=ImagePreprocessor(CLIP_336, "pad")), folder / "data.json"
    if not data.exists():
        write_photos(folder, samples)
    write_rows(vlm, data, folder)
    found = training_set(vlm, data, folder / "images", folder / "cache")
    name = f"photographs, {seconds * 1000:.0f} ms asleep"
    return [Case(name, found, batch_size, lambda _: time.sleep(seconds)) for batch_size in batch_sizes]


def write_photos(folder: Path, samples: int) -> None:
    """Images with detail at every scale, as photographs have, and a question and an answer about one of them each."""
    generator = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for number in range(PHOTOS):
        pixels = np.full((480, 640, 3), 128.0)
        for scale in (80, 32, 16, 8, 4, 2, 1):
            coarse = generator.normal(0, 4 + scale**0.7, (480 // scale, 640 // scale, 3))
            pixels += np.repeat(np.repeat(coarse, scale, axis=0), scale, axis=1)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{number}.jpg", quality=90)
    words = ["the", "shape", "is", "red", "and", "large", "left", "of", "another", "which", "was", "seen", "before"]
    records = []
    for number in range(samples):
        said = [" ".join(generator.choice(words, count)) for count in generator.integers(5, 30, 2)]
        turns = [{"from": "human", "value": f"<image>\n{said[0]}?"}, {"from": "gpt", "value": f"{said[1]}."}]
        records.append({"id": f"photo{number}", "image": f"{number % PHOTOS}.jpg", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))


def write_rows(vlm: Vlm, data: Path, folder: Path) -> None:
    """A cache of drawn targets, in shape what a teacher with ``HEADS`` heads would give."""
    file, settings = SampleFile(data), TargetSettings(cross_model=False)
    spec = CacheSpec(row_fields(settings, vlm.vocabulary), {"targets": settings.fingerprint()})
    plan = Plan(file.keys, SHARD_SAMPLES, {})
    store = CacheStore.create_or_open(folder / "cache", spec, plan, shard_format="zarr")
    preparer = Preparer.of(vlm, template="v1", max_length=2048, image_root=folder / "images")
    # Each image once, not once a sample: what is preprocessed here is not what is measured.
    photos = {f"{number}.jpg": preparer.load_images((f"{number}.jpg",)) for number in range(PHOTOS)}
    generator = np.random.default_rng(1)
    for number in store.pending():
        rows = []
        for i in range(number * SHARD_SAMPLES, min((number + 1) * SHARD_SAMPLES, len(file))):
            sample = file[i]
            text = preparer.text(sample).encoded
            _, digest = photos[sample.images[0]]
            values = draw_row(spec, text.input_ids, text.labels, vlm.vision_tokens_per_image, generator)
            rows.append(Row(sample.key, sample.id, digest, values))
        store.commit_shard(number, rows, [])


def draw_row(
    spec: CacheSpec, input_ids: np.ndarray, labels: np.ndarray, vision: int, generator: np.random.Generator
) -> dict[str, np.ndarray]:
    after = len(input_ids) - int(np.flatnonzero(input_ids == -200)[0]) - 1
    sizes = {"H": HEADS, "T": after, "V": vision, "D": WIDTH, "A": int((labels[1:] != -100).sum()), "K": 16, "S": 64}
    values = {"input_ids": input_ids.astype(np.int32), "labels": labels.astype(np.int32)}
    for field in spec.fields[2:]:
        drawn = generator.standard_exponential([sizes[dim] for dim in field.dims], dtype=np.float32)
        if field.name == "attention":
            drawn /= drawn.sum(axis=2, keepdims=True) * 1.5
        values[field.name] = (drawn * 8).astype(field.numpy_dtype) if field.dtype.startswith("uint") else drawn
    return values


def measure(case: Case, workers: int, steps: int) -> dict[str, Any]:
    order = BatchOrder(case.data.shard_of_sample, seed=0, window=WINDOW_SHARDS, batch_size=case.batch_size)
    sampler = StepSampler(order, steps=steps + 1, world_size=1, rank=0, accumulation=1)
    batches = iter(TrainingLoader(case.data, sampler, workers=workers, pin_memory=torch.cuda.is_available()))
    first = next(batches)
    sizes = tuple(first["batch"].images.shape[1:])
    case.step(first)
    waits, started = [], time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        found = next(batches)
        waits.append(time.perf_counter() - asked)
        case.step(found)
    seconds = time.perf_counter() - started
    return {
        "case": case.name,
        "samples": case.batch_size,
        "images": sizes,
        "step_ms": round(1000 * (seconds - sum(waits)) / steps, 1),
        "wait_share": round(sum(waits) / seconds, 5),
        "median_wait_ms": round(1000 * statistics.median(waits), 2),
        "longest_wait_ms": round(1000 * max(waits), 1),
        "loading_cpu_ms": round(loading_ms(case, order), 1),
    }


def loading_ms(case: Case, order: BatchOrder, batches: int = 5) -> float:
    """Processor time that a batch takes with its shards open, without handing it over."""
    chosen = [batch.tolist() for batch in order.epoch(0)[:batches]]
    for _ in range(2):  # the first time shards are opened
        started = time.process_time()
        for positions in chosen:
            case.data.collate(case.data.__getitems__(positions))
        seconds = time.process_time() - started
    return 1000 * seconds / batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--photo-samples", type=int, default=8192)
    parser.add_argument("--photo-batch", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--photo-step-ms", type=float, default=100)
    parser.add_argument("--only", choices=["demo", "photographs"])
    arguments = parser.parse_args()
    cases = []
    if arguments.only != "photographs":
        cases += demo_cases(arguments.folder / "demo")
    if arguments.only != "demo":
        seconds = arguments.photo_step_ms / 1000
        cases += photo_cases(arguments.folder / "photos", arguments.photo_samples, seconds, arguments.photo_batch)
    for case in cases:
        print(json.dumps(measure(case, arguments.workers, arguments.steps)), flush=True)
    print(json.dumps({"workers": arguments.workers, "cores": os.cpu_count(), "load_average": os.getloadavg()}), flush=True)


if __name__ == "__main__":
    main()
