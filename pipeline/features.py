"""Features of the frozen vision tower, computed once for every image of a training set and kept in memory.

They are what the tower would give in every epoch. Worth it where the tower is a large part of the step and the images are
few: it takes images x patches x tower width numbers.
"""

from collections.abc import Sequence
from contextlib import suppress

import torch

from alignkd.models.vlm import Vlm
from alignkd.pipeline.loader import TrainingSet
from alignkd.pipeline.prepare import Preparer, SampleError
from alignkd.pipeline.progress import bar

_BATCH = 64


def cache_tower_features(vlm: Vlm, data: TrainingSet, *, limit_bytes: int) -> None:
    """Fill ``data.preparer.features``; its samples then carry features ``[n, P, C]`` instead of pixel values.

    Raises:
        ValueError: they would take more than ``limit_bytes``.
    """
    references = sorted({reference for i in range(len(data)) for reference in data.sample(i).images})
    vision = vlm.model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    needed = len(references) * patches * vision.hidden_size * vlm.model.dtype.itemsize
    if needed > limit_bytes:
        raise ValueError(
            f"--cache-tower-features needs {needed / 2**30:.1f} GiB for {len(references):,} images, more than the"
            f" {limit_bytes / 2**30:.1f} GiB allowed; leave it out"
        )
    with bar("tower features", len(references), "images") as progress:
        for start in range(0, len(references), _BATCH):
            chunk = references[start : start + _BATCH]
            data.preparer.features |= tower_features(vlm, data.preparer, chunk)
            progress.advance(len(chunk))


@torch.no_grad()
def tower_features(vlm: Vlm, preparer: Preparer, references: Sequence[str]) -> dict[str, tuple[str, torch.Tensor]]:
    """Features ``[P, C]`` of images by reference, each with its file's SHA-256.

    An unreadable image is absent: the sample that uses it is then named and counted.
    """
    features = {}
    for start in range(0, len(references), _BATCH):
        loaded = {}
        for reference in references[start : start + _BATCH]:
            with suppress(SampleError):
                loaded[reference] = preparer.load_images((reference,))
        if loaded:
            pixels = torch.cat([images for images, _ in loaded.values()]).to(vlm.device)
            encoded = vlm.model.model.encode_images(pixels).cpu()
            for (reference, (_, digest)), values in zip(loaded.items(), encoded, strict=True):
                features[reference] = (digest, values.clone())
    return features
