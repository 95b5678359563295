"""Pictures of a benchmark as a model takes them: treated as the benchmark's loader does, read ahead, through the tower once.

Shapes: P patches, C tower width.
"""

import io
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from alignkd.errors import DataError, SampleError
from alignkd.inputs.encoder import Encoder
from alignkd.models.encoders.image_files import open_image
from alignkd.models.encoders.pillow_rgb import rgb_by_pillow
from alignkd.models.encoders.placeholder import LoadedImage, PlaceholderEncoder
from alignkd.models.vlm import Vlm
from alignkd.pipeline.data.tower_features import IMAGES_AT_ONCE
from alignkd.pipeline.evaluate.benchmarks.contract import Benchmark, ImageTreatment

OWN_TREATMENT = "the model's own"


def with_treatment(encoder: Encoder, treatment: ImageTreatment) -> tuple[Encoder, str]:
    """An encoder that treats pictures as MobileVLM's loader for a benchmark does, and what is done, in words.

    A loader that pads does so if the checkpoint's ``image_aspect_ratio`` says "pad", as that of each release does. Other
    families have a processor of their own.
    """
    if not isinstance(encoder, PlaceholderEncoder):
        return encoder, OWN_TREATMENT
    treatment = treatment if encoder.images.aspect_ratio == "pad" else "crop"
    return replace(encoder, images=replace(encoder.images, aspect_ratio=treatment)), treatment


class Pictures:
    """The pictures of one benchmark, for one model."""

    def __init__(self, vlm: Vlm, encoder: Encoder, benchmark: Benchmark) -> None:
        self.vlm, self.encoder, self.benchmark = vlm, encoder, benchmark

    def load(self, reference: str) -> Any:
        """One picture as the encoder takes it.

        Raises:
            DataError: it is missing, damaged or too large.
        """
        data = self.benchmark.read_image(reference)
        try:
            image = open_image(io.BytesIO(data), "its file")
            if isinstance(self.encoder, PlaceholderEncoder):
                return self.encoder.load(image)
            # Encoders from outside of the package may lack the method.
            return self.encoder.load(getattr(self.encoder, "decode", rgb_by_pillow)(image))
        except SampleError as error:
            raise DataError(
                f"picture {reference} of {self.benchmark.about.title} ({self.benchmark.folder}): {error}; no question may be"
                " left out, so get the official picture again"
            ) from error

    def ask(self, pool: ThreadPoolExecutor, references: Sequence[str]) -> dict[str, "Future[Any]"]:
        """Have pictures loaded by the threads of a pool."""
        return {reference: pool.submit(self.load, reference) for reference in references}

    def ready(self, asked: Mapping[str, "Future[Any]"]) -> dict[str, Any]:
        """Pictures that were asked for; features ``[P, C]`` from the tower, on its device, where the family takes those.

        Raises:
            DataError: as :meth:`load`.
        """
        loaded = {reference: future.result() for reference, future in asked.items()}
        return self._features(loaded) if self.vlm.caches_tower else loaded

    @torch.no_grad()
    def _features(self, loaded: Mapping[str, LoadedImage]) -> dict[str, LoadedImage]:
        references, features = list(loaded), dict[str, LoadedImage]()
        for start in range(0, len(references), IMAGES_AT_ONCE):
            some = references[start : start + IMAGES_AT_ONCE]
            encoded = self.vlm.run_tower(torch.stack([loaded[name].values for name in some]).to(self.vlm.device))
            features |= {name: LoadedImage(values, loaded[name].size) for name, values in zip(some, encoded, strict=True)}
        return features
