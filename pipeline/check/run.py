"""``alignkd check``: everything that is wrong with data, in one pass.

1. The data is indexed: every record is parsed once.
2. The images that samples name are read once each, by several processes.
3. Every sample is judged, with what is known of its images: by its text alone, or by a model's own encoder.
4. What was found is added up, source by source, and duplicates are counted.
"""

import time
from typing import Any

import numpy as np

from alignkd.models.encoders.pillow_rgb import rgb_by_pillow
from alignkd.pipeline.check.image_facts import Decode, Facts, ImageFact, ImageTally, place_hash
from alignkd.pipeline.check.look import ImageLook, PlaceLook, SampleLook, spans
from alignkd.pipeline.check.pool import looked, workers_for
from alignkd.pipeline.check.report import Checked, report
from alignkd.pipeline.check.tally import Tally
from alignkd.pipeline.check.verdicts import Judge, PlainJudge
from alignkd.pipeline.config.check import CheckConfig
from alignkd.pipeline.data.contract import Samples
from alignkd.pipeline.data.open_samples import check_images, open_samples
from alignkd.pipeline.runtime.progress import progress_bar
from alignkd.pipeline.runtime.signals import Interrupted, StopFlag, stop_on_signals
from alignkd.plugins import load_plugins

_SAMPLES_AT_ONCE = 2048
_IMAGES_AT_ONCE = 32
_FEW_SAMPLES = 20_000
_FEW_IMAGES = 256


def check(config: CheckConfig) -> dict[str, Any]:
    """What is wrong with the data of a configuration: the figures of ``--json``.

    Raises:
        AlignkdError: data that cannot be read at all, or a model that is none.
        Interrupted: a signal came.
    """
    if config.read_images:
        check_images(config)
    load_plugins(config.plugins)
    with stop_on_signals() as stop:
        try:
            return _check(config, stop)
        except Interrupted as stopped:
            raise Interrupted(f"stopped by {stop.signal_name}, before everything was checked; nothing was written") from stopped


def _check(config: CheckConfig, stop: StopFlag) -> dict[str, Any]:
    started = time.monotonic()
    samples = open_samples(config)
    stop.check()
    model, decode = None, rgb_by_pillow
    if config.model is not None:
        from alignkd.pipeline.check.with_model import open_model

        model = open_model(config)
        decode = getattr(model.encoder, "decode", rgb_by_pillow)
    facts, images = _read_images(config, samples, decode, stop) if config.read_images else (None, None)
    judge: Judge = PlainJudge(facts)
    if model is not None:
        from alignkd.pipeline.check.with_model import ModelJudge

        judge = ModelJudge(model.encoder, model.tokens_per_placeholder, facts)
    tallies, contents_N = _judge(config, samples, judge, stop)
    checked = Checked(config, samples, tallies, contents_N, images, model)
    return report(checked) | {"seconds": round(time.monotonic() - started, 1)}


def _read_images(config: CheckConfig, samples: Samples, decode: Decode, stop: StopFlag) -> tuple[Facts, ImageTally]:
    """The facts of all images, each read once."""
    places = _places(config, samples, stop)
    tally, facts = ImageTally(config.first), list[ImageFact]()
    parts = [places[start:end] for start, end in spans(len(places), _IMAGES_AT_ONCE)]
    workers = workers_for(len(places), config.workers, _FEW_IMAGES)
    with progress_bar("images", len(places), "images", show=bool(places)) as progress:
        for part, found in looked(ImageLook(decode), parts, workers, stop):
            for place, fact in zip(part, found, strict=True):
                tally.add(place, fact)
            facts += found
            progress.advance(len(part))
    return Facts.of([place_hash(place) for place in places], facts), tally


def _places(config: CheckConfig, samples: Samples, stop: StopFlag) -> list[str]:
    """The different places of all images."""
    found = dict[str, None]()
    workers = workers_for(len(samples), config.workers, _FEW_SAMPLES)
    with progress_bar("find images", len(samples), "samples", show=len(samples) > _FEW_SAMPLES) as progress:
        for (start, end), places in looked(PlaceLook(samples), spans(len(samples), _SAMPLES_AT_ONCE), workers, stop):
            found.update(dict.fromkeys(places))
            progress.advance(end - start)
    return list(found)


def _judge(config: CheckConfig, samples: Samples, judge: Judge, stop: StopFlag) -> tuple[dict[str, Tally], np.ndarray]:
    """Tallies by the name of the source, and a hash of each sample's content."""
    tallies, contents = dict[str, Tally](), list[np.ndarray]()
    few = _FEW_SAMPLES if config.model is None else _FEW_SAMPLES // 10
    workers = workers_for(len(samples), config.workers, few)
    look = SampleLook(samples, judge, config.first)
    with progress_bar("samples", len(samples), "samples") as progress:
        for (start, end), found in looked(look, spans(len(samples), _SAMPLES_AT_ONCE), workers, stop):
            for name, tally in found.tallies.items():
                tallies.setdefault(name, Tally(config.first)).merge(tally)
            contents.append(found.contents_N)
            progress.advance(end - start)
    return tallies, np.concatenate(contents)
