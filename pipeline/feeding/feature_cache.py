"""Features of the frozen vision tower, computed once for every image of a training set and kept in memory.

The tower would give the same features in every epoch. This pays off where the tower is a large part of the step and there
are few images: it takes images x patches x tower width numbers, once, whatever the number of loader processes.

Shapes: N images, P patches, C tower width.
"""

from collections.abc import Mapping
from typing import Any

import torch

from alignkd.errors import ConfigError
from alignkd.models.encoders.placeholder import LoadedImage
from alignkd.models.vlm import Vlm
from alignkd.pipeline.data.tower_features import IMAGES_AT_ONCE, tower_features
from alignkd.pipeline.feeding.dataset import TrainingSet
from alignkd.pipeline.runtime.progress import progress_bar


class SharedFeatures(dict[str, tuple[str, LoadedImage]]):
    """Features by the place of an image, each with its file's SHA-256: rows of one tensor ``[N, P, C]``.

    A forked process shares the memory. To a spawned process torch sends the tensor through shared memory: once, where
    thousands of tensors would each take an open file.
    """

    def __init__(self, about: Mapping[str, tuple[str, tuple[int, int]]], features_NPC: torch.Tensor) -> None:
        """``about``: the file's SHA-256 and the image's size of each place, in the order of the rows."""
        rows = zip(about.items(), features_NPC, strict=True)
        super().__init__({name: (digest, LoadedImage(values_PC, size)) for (name, (digest, size)), values_PC in rows})
        self.features_NPC = features_NPC

    def __reduce__(self) -> tuple[Any, ...]:
        about = {name: (digest, picture.size) for name, (digest, picture) in self.items()}
        return SharedFeatures, (about, self.features_NPC)


def cache_tower_features(vlm: Vlm, data: TrainingSet, *, limit_bytes: int) -> None:
    """Fill ``data.preparer.features``; its samples then carry features ``[n, P, C]`` instead of pixel values.

    Raises:
        ConfigError: they would take more than ``limit_bytes``, or the model family has no such features.
    """
    if not vlm.caches_tower:
        raise ConfigError(f"--cache-tower-features does not work with the model family {vlm.family}; remove the option")
    places = sorted({place for i in range(len(data)) for place in data.preparer.places(data.sample(i))})
    patches, width = vlm.tower_feature_shape
    needed = len(places) * patches * width * vlm.dtype.itemsize
    if needed > limit_bytes:
        raise ConfigError(
            f"--cache-tower-features needs {needed / 2**30:.1f} GiB for {len(places):,} images, more than the"
            f" {limit_bytes / 2**30:.1f} GiB allowed; remove the option"
        )
    features_NPC, about = torch.empty(0), dict[str, tuple[str, tuple[int, int]]]()
    with progress_bar("tower features", len(places), "images") as progress:
        for start in range(0, len(places), IMAGES_AT_ONCE):
            chunk = places[start : start + IMAGES_AT_ONCE]
            for place, (digest, picture) in tower_features(vlm, data.preparer, chunk).items():
                if not about:
                    features_NPC = picture.values.new_empty(len(places), *picture.values.shape)
                features_NPC[len(about)] = picture.values
                about[place] = digest, picture.size
            progress.advance(len(chunk))
    data.preparer.features = SharedFeatures(about, features_NPC[: len(about)])
