"""Does the teacher look? Before a cache is written, what its images add to its answers is measured on a few samples.

A tower whose weights were not loaded, or images that are prepared wrongly, give a teacher that reads well and sees nothing: its
targets look sound. So its answers are compared with those it gives to destroyed images (:mod:`alignkd.inputs.destroyed`).

The figure is the mean over samples of the mean **signed** difference of log-probabilities over their answer tokens. Most tokens
follow from the text alone, so that a median is near zero for teachers that see, too; and a tower of noise changes
log-probabilities as well, but as often to the worse as to the better.

Shapes: A answers.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch

from alignkd.cache_store.protocol.store import CacheStore
from alignkd.capture.advantage import gains
from alignkd.capture.attention import capture
from alignkd.errors import SampleError
from alignkd.inputs.batch import Batch
from alignkd.models.vlm import Vlm
from alignkd.pipeline.cache_admin.sight import recorded_sight, sight_words
from alignkd.pipeline.config.cache_teacher import CacheTeacherConfig
from alignkd.pipeline.data.contract import Samples
from alignkd.pipeline.data.preparer import Preparer
from alignkd.pipeline.runtime.out_of_memory import is_out_of_memory
from alignkd.pipeline.runtime.signals import StopFlag
from alignkd.pipeline.stage_one.calibrate import CALIBRATION_POSITIONS, CALIBRATION_SAMPLES
from alignkd.pipeline.stage_one.shard_work import PlannedSample, batches

THRESHOLD = 0.03
"""Nats an answer token: a mean that is less, or within its standard error of less, is a blind teacher's."""
LOOKED_AT = 64
"""Samples with an image that are compared, at most."""
LEAST_SAMPLES = 8
"""Fewer decide nothing."""
POSITIONS = 32_768
"""Positions of the samples together, at most: seconds on a device that serves for the teacher."""

_log = logging.getLogger(__name__)


class Stage(Protocol):
    """What is looked at of an opened stage one."""

    config: CacheTeacherConfig
    teacher: Vlm
    samples: Samples
    stop: StopFlag

    @property
    def held(self) -> Sequence[int]:
        """The positions of the plan whose samples can be read."""

    @property
    def preparer(self) -> Preparer:
        """Turns samples into inputs of the teacher."""


@dataclass
class _Found:
    """The mean gain of each sample, and the gain of every answer token."""

    of_samples: list[float] = field(default_factory=list)
    of_tokens: list[float] = field(default_factory=list)

    def add(self, gain_A: torch.Tensor, owners_A: torch.Tensor) -> None:
        """Add a batch; samples with numbers that are not finite are left out."""
        for owner in sorted(set(owners_A.tolist())):
            mine = gain_A[owners_A == owner]
            if bool(mine.isfinite().all()):
                self.of_samples.append(float(mine.mean()))
                self.of_tokens += mine.tolist()

    def figures(self) -> dict[str, Any]:
        """For the record of the run."""
        gain, count = float(np.mean(self.of_samples)), len(self.of_samples)
        error = float(np.std(self.of_samples, ddof=1)) / math.sqrt(count) if count > 1 else 0.0
        return {
            "samples": count,
            "tokens": len(self.of_tokens),
            "gain": round(gain, 6),
            "standard_error": round(error, 6),
            "median_advantage": round(max(float(np.median(self.of_tokens)), 0.0), 6),
            "threshold": THRESHOLD,
            "blind": gain - error < THRESHOLD if count >= LEAST_SAMPLES else None,
        }


def check_sight(stage: Stage, store: CacheStore) -> dict[str, Any] | None:
    """The figures of an earlier run of this cache, else new ones; logs a warning where the teacher is blind.

    None where no sample tried has an image.
    """
    found = recorded_sight(store.storage) or look(stage)
    if found is not None and found["blind"]:
        _log.warning("%s", warning_words(found))
    return found


def warning_words(found: dict[str, Any]) -> str:
    """What is wrong, and what to do."""
    return (
        f"the teacher does not look at its images: over {found['samples']} samples, an image in place of a destroyed one adds"
        f" {found['gain']:.4f} nats (standard error {found['standard_error']:.4f}) to the log-probability of an answer token,"
        f" where that of a teacher that sees, less the error, is {found['threshold']:g} or more (the median advantage is"
        f" {found['median_advantage']:.4f}). Its targets would teach nothing about images. Look at one sample with alignkd show"
        " --model; see that the weights of the vision tower are in the checkpoint (or --vision-tower names the right one), that"
        " preprocessor_config.json belongs to this teacher, and that --images are the images of --data"
    )


@torch.inference_mode()
def look(stage: Stage) -> dict[str, Any] | None:
    """Compare the teacher's answers with and without its images, on samples spread over the data."""
    found, teacher = _Found(), stage.teacher
    for batch in _batches(stage):
        stage.stop.check()
        try:
            on_device = batch.to(teacher.device)
            gain_A = gains(teacher, on_device, capture(teacher, on_device, attention=False).hidden_AD)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            continue
        found.add(gain_A.float().cpu(), batch.answer_samples_A)
    return found.figures() if found.of_samples else None


def _batches(stage: Stage) -> Iterator[Batch]:
    """What cannot be used is skipped here, and rejected with its shard later."""
    preparer = replace(stage.preparer, with_destroyed=True)
    for part in batches(_chosen(stage), min(stage.config.batch_tokens, CALIBRATION_POSITIONS)):
        inputs = []
        for one in part:
            try:
                inputs.append(preparer.with_images(one.sample, one.text).input)
            except SampleError:
                continue
        if inputs:
            yield stage.teacher.collate(inputs)


def _chosen(stage: Stage) -> list[PlannedSample]:
    held = stage.held
    tried = [held[i] for i in np.linspace(0, len(held) - 1, min(CALIBRATION_SAMPLES, len(held))).astype(int).tolist()]
    with_image = [position for position in tried if stage.samples[position].images]
    if len(with_image) > LOOKED_AT:
        with_image = [with_image[i] for i in np.linspace(0, len(with_image) - 1, LOOKED_AT).astype(int).tolist()]
    chosen, positions = list[PlannedSample](), 0
    for position in with_image:
        sample = stage.samples[position]
        try:
            planned = PlannedSample(sample, stage.preparer.text(sample))
        except SampleError:
            continue
        if chosen and positions + planned.length > POSITIONS:
            continue
        chosen.append(planned)
        positions += planned.length
    return chosen


def sight_of_start(found: dict[str, Any] | None) -> str | None:
    """For the line that says what starts."""
    return None if found is None else sight_words(found)
