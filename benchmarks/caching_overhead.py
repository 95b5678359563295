"""What caching adds to the teacher's bare forward passes: both over the same batches, alternating, in one process.

The teacher has random weights and MobileVLM V2's proportions; it must be large enough for the forward pass to weigh more
than reading images and writing rows. Images are written as JPEG of 640 x 480 pixels.

Example: python benchmarks/caching_overhead.py --folder /scratch/overhead
On a GPU, at the size of MobileVLM V2 7B: --device cuda --dtype bfloat16 --width 4096 --layers 32 --vision-width 1024
--vision-layers 24 --samples 512
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig

from alignkd.models.checkpoints.tokenizer_files import load_tokenizer
from alignkd.models.encoders.images import ImagePreprocessor
from alignkd.models.families.mobilevlm import MobileVlmFamily
from alignkd.models.loading import save_vlm
from alignkd.models.modules.mobilevlm import MobileVlm, MobileVlmConfig
from alignkd.pipeline.config.cache_teacher import CacheTeacherConfig
from alignkd.pipeline.config.targets import TargetSettings
from alignkd.pipeline.runtime.devices import parse_dtype, pick_device
from alignkd.pipeline.runtime.ranks import Worker
from alignkd.pipeline.runtime.run_record import collect_versions
from alignkd.pipeline.runtime.signals import StopFlag
from alignkd.pipeline.stage_one.shard_work import ReadyBatch
from alignkd.pipeline.stage_one.teacher_stage import StageOne
from alignkd.pipeline.stage_one.worker import WorkerJob

TOKENIZER = Path(__file__).parents[1] / "tests" / "data" / "mobilevlm_v2_tiny" / "teacher"
VOCABULARY = 32_000


def write_teacher(folder: Path, arguments: argparse.Namespace) -> None:
    vision = CLIPVisionConfig(
        hidden_size=arguments.vision_width,
        intermediate_size=4 * arguments.vision_width,
        num_hidden_layers=arguments.vision_layers,
        num_attention_heads=max(arguments.vision_width // 64, 1),
        image_size=336,
        patch_size=14,
        projection_dim=arguments.vision_width,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=arguments.width,
        intermediate_size=round(arguments.width * 2.6875),
        num_hidden_layers=arguments.layers,
        num_attention_heads=max(arguments.width // 128, 1),
        pad_token_id=0,
    )
    config = MobileVlmConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), vision_feature_layer=-2)
    torch.manual_seed(0)
    torch.set_default_dtype(parse_dtype(arguments.dtype))
    model = MobileVlm(config)
    torch.set_default_dtype(torch.float32)
    settings = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}, "resample": 3}
    settings |= {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    vlm = MobileVlmFamily(model, load_tokenizer(TOKENIZER), TOKENIZER, ImagePreprocessor(settings, "pad"))
    save_vlm(vlm, folder, official=True)


def write_data(folder: Path, samples: int) -> Path:
    generator = np.random.default_rng(0)
    (folder / "images").mkdir(exist_ok=True)
    records = []
    for i in range(samples):
        pixels = np.kron(generator.integers(0, 256, (30, 40, 3), dtype=np.uint8), np.ones((16, 16, 1), dtype=np.uint8))
        Image.fromarray(pixels).save(folder / "images" / f"{i}.jpg", quality=90)
        words = " ".join(generator.choice(["the", "shape", "is", "red", "and", "large"], 60))
        turns = [{"from": "human", "value": f"<image>\n{words}?"}, {"from": "gpt", "value": words}]
        records.append({"id": str(i), "image": f"{i}.jpg", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


@torch.inference_mode()
def bare_seconds(stage: StageOne, batches: list[ReadyBatch]) -> float:
    """Tower, projector, decoder and output head at the answers: what any use of the teacher costs."""
    model, device = stage.teacher.model, stage.teacher.device
    started = time.perf_counter()
    for ready in batches:
        assert ready.batch is not None
        batch = ready.batch.to(device)
        vision = model.model.encode_images(batch.images).flatten(0, 1)
        hidden = model.model.decode(batch.input_ids_BS, batch.attention_mask_BS, vision, batch.vision_positions)
        model.lm_head(hidden.flatten(0, 1)[batch.answer_positions_A]).argmax(1)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def caching_seconds(stage: StageOne, cache: Path) -> float:
    shutil.rmtree(cache, ignore_errors=True)
    store = stage.open_store()  # plan and calibration are made once a cache, whatever its size
    started = time.perf_counter()
    WorkerJob(stage, store, Worker(), StopFlag()).run(store.pending())
    assert store.status().complete
    return time.perf_counter() - started


def measure(stage: StageOne, cache: Path, repeats: int) -> dict[str, Any]:
    stage.fingerprint()  # hashes the weights once; the store asks for it every time
    batches = [stage.load(items) for shard in range(stage.plan.shards) for items in stage.batch_shard(shard).batches]
    bare_seconds(stage, batches[:1])
    pairs = [(bare_seconds(stage, batches), caching_seconds(stage, cache)) for _ in range(repeats)]
    return {
        "bare_seconds": [round(bare, 2) for bare, _ in pairs],
        "caching_seconds": [round(caching, 2) for _, caching in pairs],
        "ratios": [round(caching / bare, 3) for bare, caching in pairs],
        "median_ratio": round(float(np.median([caching / bare for bare, caching in pairs])), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vision-width", type=int, default=768)
    parser.add_argument("--vision-layers", type=int, default=12)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "teacher").exists():
        write_teacher(folder / "teacher", arguments)
    config = CacheTeacherConfig(
        teacher=str(folder / "teacher"),
        data=str(write_data(folder, arguments.samples)),
        images=str(folder / "images"),
        cache=str(folder / "cache"),
        settings=TargetSettings(),
        shard_samples=max(arguments.samples // 4, 1),
        batch_tokens=arguments.batch_tokens,
        dtype=arguments.dtype,
        device=pick_device(arguments.device),
        template="v1",
    )
    stage = StageOne.open(config)
    parameters = sum(p.numel() for p in stage.teacher.model.parameters())
    figures = measure(stage, folder / "cache", arguments.repeats)
    print(
        json.dumps(
            {"parameters": parameters, "samples": arguments.samples, **figures, "versions": collect_versions()}, indent=2
        )
    )


if __name__ == "__main__":
    main()
