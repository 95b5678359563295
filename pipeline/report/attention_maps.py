"""Run models on a few samples, and keep where their text looks. Imports torch; the pages that draw the maps do not.

Shapes: H heads, T text rows, V vision columns, R regions of 8 numbers each (see :mod:`alignkd.inputs.regions`).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alignkd.capture.attention import enable_capture
from alignkd.errors import AlignkdError, SampleError
from alignkd.inputs.prompts import check_template
from alignkd.models.loading import load_vlm
from alignkd.models.vlm import Vlm
from alignkd.pipeline.config.shared import DEFAULT_MAX_LENGTH, DataSettings
from alignkd.pipeline.data.open_samples import open_samples
from alignkd.pipeline.data.preparer import Preparer
from alignkd.pipeline.data.sample import Sample
from alignkd.pipeline.evaluate.show_sample import captured_arrays
from alignkd.pipeline.hub.models import model_folder, tower_folder
from alignkd.pipeline.report.attention_grid import Seen
from alignkd.pipeline.runtime.devices import parse_dtype, pick_device
from alignkd.pipeline.runtime.out_of_memory import is_out_of_memory

_log = logging.getLogger(__name__)

_TRIES = 16
"""So many samples are looked at for each that is wanted, as many may share an image."""


@dataclass(frozen=True)
class Prompting:
    """How samples are put to a model. ``template``: None for the model's own. ``images``: the image folder of samples that do
    not say where their images are."""

    images: str | None = None
    template: str | None = None
    max_length: int = DEFAULT_MAX_LENGTH
    prompt_date: str | None = None
    vision_tower: str | None = None
    device: str | None = None
    dtype: str = "float32"


def choose_samples(settings: DataSettings, count: int) -> list[Sample]:
    """Samples that have an image, spread evenly over the data, each with another image than the ones before.

    Raises:
        DataError: the file cannot be read, or no sample of it has an image.
    """
    samples = open_samples(settings)
    assert samples.image_counts is not None
    with_image = np.flatnonzero(samples.image_counts)
    chosen = dict[tuple[str, ...], Sample]()
    places = np.linspace(0, len(with_image) - 1, min(len(with_image), _TRIES * count)).round().astype(int).tolist()
    for place in (place for start in range(_TRIES) for place in places[start::_TRIES]):
        sample = samples[int(with_image[place])]
        if not sample.fault:
            chosen.setdefault(sample.places, sample)
        if len(chosen) == count:
            break
    if not chosen:
        raise SampleError(f"no sample of {settings.data_words} has an image")
    return list(chosen.values())


def look(folder: str | Path, samples: Sequence[Sample], prompting: Prompting) -> list[Seen | str]:
    """What a model attends to on each sample; why not, where it cannot be run on one.

    Raises:
        AlignkdError: the model cannot be loaded, or memory is short.
    """
    _log.info("attention of %s on %s samples", folder, len(samples))
    tower = tower_folder(prompting.vision_tower)
    device, dtype = pick_device(prompting.device), parse_dtype(prompting.dtype)
    try:
        vlm = load_vlm(model_folder(folder), dtype=dtype, device=device, vision_tower=tower)
        enable_capture(vlm)
        template = prompting.template or vlm.default_template
        check_template(template, vlm.templates)
        preparer = Preparer.of(
            vlm,
            template=template,
            max_length=prompting.max_length,
            image_root=prompting.images,
            prompt_date=prompting.prompt_date,
        )
        return [_seen(vlm, preparer, sample) for sample in samples]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise AlignkdError(f"{folder} needs more memory than {device} has; try --device cpu, or --samples 0") from error


def _seen(vlm: Vlm, preparer: Preparer, sample: Sample) -> Seen | str:
    try:
        prepared = preparer(sample)
        pictures = preparer.decoded_images(sample)
    except SampleError as error:
        return str(error)
    attention_HTV = captured_arrays(vlm, prepared)["attention_HTV"]
    if not attention_HTV.size:
        return "no text comes after its image"
    return Seen(np.asarray(pictures[0], dtype=np.float32) / 255, attention_HTV, prepared.input.regions_R8)
