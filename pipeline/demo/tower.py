"""The demo's vision tower: a small CLIP vision transformer, trained to name colour and shape, in place of captions.

It is trained before any vision-language model uses it. After that it is frozen, in the teacher and in the students.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel, get_wsd_schedule

from alignkd.models.encoders.image_files import decode_image, read_image_bytes
from alignkd.models.encoders.images import ImagePreprocessor
from alignkd.pipeline.config.demo import TowerTraining
from alignkd.pipeline.data.easy_vqa import COLOURS, SHAPES
from alignkd.pipeline.runtime.progress import progress_bar

IMAGE_SETTINGS = {
    "size": {"shortest_edge": 64},
    "crop_size": {"height": 64, "width": 64},
    "resample": 3,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def tower_config(training: TowerTraining) -> CLIPVisionConfig:
    """The tower's configuration as CLIP's."""
    return CLIPVisionConfig(
        hidden_size=training.hidden_size,
        intermediate_size=training.intermediate_size,
        num_hidden_layers=training.layers,
        num_attention_heads=training.heads,
        image_size=64,
        patch_size=training.patch_size,
        hidden_act="gelu",
        projection_dim=training.hidden_size,
    )


def load_pixels(root: Path, references: list[str]) -> torch.Tensor:
    """Pixel values ``[n, 3, 64, 64]`` of images, in their order."""
    preprocess = ImagePreprocessor(IMAGE_SETTINGS, "pad")
    loaded = []
    with progress_bar("read images", len(references), "images") as progress:
        for reference in references:
            loaded.append(preprocess(decode_image(read_image_bytes(root / reference), reference)))
            progress.advance()
    return torch.stack(loaded)


def train_tower(
    root: Path,
    labels: Mapping[str, tuple[int, int]],
    held_out: Mapping[str, tuple[int, int]],
    training: TowerTraining,
    device: str,
) -> tuple[CLIPVisionModel, dict[str, float]]:
    """Train on images with a colour or a shape label; accuracy of both on the held-out images."""
    pixels = load_pixels(root, list(labels))
    targets = torch.tensor(list(labels.values()))
    tower = CLIPVisionModel(tower_config(training)).to(device)
    heads = nn.Linear(training.hidden_size, len(COLOURS) + len(SHAPES)).to(device)
    parameters = [*tower.parameters(), *heads.parameters()]
    steps = training.epochs * (len(pixels) // training.batch_size)
    optimizers = _optimizers(tower, heads, training)
    schedules = [get_wsd_schedule(o, steps // 10, 6 * steps // 10, num_training_steps=steps) for o in optimizers]
    with progress_bar("train vision tower", steps, "steps") as progress:
        for _ in range(training.epochs):
            order = torch.randperm(len(pixels))
            for start in range(0, len(pixels) - training.batch_size + 1, training.batch_size):
                chosen = order[start : start + training.batch_size]
                images = _augment(pixels[chosen].to(device, non_blocking=True))
                loss = _loss(heads(_pooled(tower, images)), targets[chosen].to(device))
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(parameters, 1.0)
                for optimizer, schedule in zip(optimizers, schedules, strict=True):
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    schedule.step()
                progress.advance()
            progress.note(f"loss {loss.item():.3f}")
    tower.eval()
    return tower, _accuracy(tower, heads, load_pixels(root, list(held_out)), torch.tensor(list(held_out.values())), device)


def _optimizers(tower: CLIPVisionModel, heads: nn.Module, training: TowerTraining) -> list[torch.optim.Optimizer]:
    # Muon for the matrices of the layers: on a CPU it learns to tell shapes apart in a third of AdamW's epochs.
    matrices = [p for name, p in tower.named_parameters() if p.ndim == 2 and ".layers." in name]
    taken = {id(p) for p in matrices}
    others = [p for p in (*tower.parameters(), *heads.parameters()) if id(p) not in taken]
    return [
        torch.optim.Muon(matrices, lr=training.muon_learning_rate, weight_decay=0.02),
        torch.optim.AdamW(others, lr=training.learning_rate, weight_decay=0.02),
    ]


def _pooled(tower: CLIPVisionModel, pixels: torch.Tensor) -> torch.Tensor:
    # The patch tokens, not the class token: a projector gets the patch tokens.
    return tower(pixels).last_hidden_state[:, 1:].mean(dim=1)  # type: ignore[no-any-return]


def _augment(images: torch.Tensor) -> torch.Tensor:
    """Flip, transpose and shift a batch at random: the labels of colour and shape stay right."""
    if torch.rand(()) < 0.5:
        images = images.flip(2)
    if torch.rand(()) < 0.5:
        images = images.flip(3)
    if torch.rand(()) < 0.5:
        images = images.transpose(2, 3)
    shift = torch.randint(-4, 5, (2,)).tolist()
    padded = functional.pad(images, (4, 4, 4, 4), mode="replicate")
    return padded[:, :, 4 + shift[0] : 68 + shift[0], 4 + shift[1] : 68 + shift[1]]


def _loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    colour = functional.cross_entropy(logits[:, : len(COLOURS)], targets[:, 0], ignore_index=-1)
    shape = functional.cross_entropy(logits[:, len(COLOURS) :], targets[:, 1], ignore_index=-1)
    return colour + shape


@torch.no_grad()
def _accuracy(
    tower: CLIPVisionModel, heads: nn.Module, pixels: torch.Tensor, targets: torch.Tensor, device: str
) -> dict[str, float]:
    logits = torch.cat([heads(_pooled(tower, chunk.to(device))).cpu() for chunk in torch.split(pixels, 256)])
    right_colour = (logits[:, : len(COLOURS)].argmax(1) == targets[:, 0])[targets[:, 0] >= 0]
    right_shape = (logits[:, len(COLOURS) :].argmax(1) == targets[:, 1])[targets[:, 1] >= 0]
    return {"colour": right_colour.float().mean().item(), "shape": right_shape.float().mean().item()}
