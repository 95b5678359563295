"""Features of the frozen vision tower for a set of images.

Shapes: P patches, C tower width.
"""

from collections.abc import Sequence
from contextlib import suppress

import torch

from alignkd.errors import SampleError
from alignkd.models.encoders.placeholder import LoadedImage
from alignkd.models.vlm import Vlm
from alignkd.pipeline.data.preparer import Preparer

IMAGES_AT_ONCE = 64
"""Images that go through the tower in one batch."""


@torch.no_grad()
def tower_features(vlm: Vlm, preparer: Preparer, places: Sequence[str]) -> dict[str, tuple[str, LoadedImage]]:
    """Features ``[P, C]`` of images by their places (:meth:`Preparer.places`), each with its file's SHA-256.

    An unreadable image is left out: the sample that uses it is rejected when its turn comes.
    """
    features = {}
    for start in range(0, len(places), IMAGES_AT_ONCE):
        loaded = {}
        for place in places[start : start + IMAGES_AT_ONCE]:
            with suppress(SampleError):
                loaded[place] = preparer.load_images((place,))
        if loaded:
            pixels = torch.stack([images[0].values for images, _ in loaded.values()]).to(vlm.device)
            encoded = vlm.run_tower(pixels).cpu()
            for (place, (images, digest)), values in zip(loaded.items(), encoded, strict=True):
                features[place] = (digest, LoadedImage(values.clone(), images[0].size))
    return features
