"""Accuracy of a model on a question file: generate the last answer of each sample, and compare it with the file's."""

import json
import logging
from collections.abc import Container
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from alignkd.models.loading import load_vlm
from alignkd.models.vlm import Vlm
from alignkd.pipeline.config.benchmark import BATCH_TOKENS
from alignkd.pipeline.config.evaluate import EvaluateConfig
from alignkd.pipeline.config.shared import DEFAULT_MAX_LENGTH
from alignkd.pipeline.data.contract import NO_IMAGE, Samples
from alignkd.pipeline.data.open_samples import check_images, open_samples
from alignkd.pipeline.data.preparer import Preparer
from alignkd.pipeline.data.rejected_samples import RejectedSamples
from alignkd.pipeline.data.sample import Sample
from alignkd.pipeline.evaluate.metrics import Metric, get_metric, is_empty
from alignkd.pipeline.evaluate.running.batches import Batches
from alignkd.pipeline.evaluate.running.predictions import Predictions, explained, open_predictions, prompt_date_of
from alignkd.pipeline.evaluate.running.questions import Questions
from alignkd.pipeline.evaluate.running.schedule import WINDOW, WINDOW_OF_PIXELS, Group, windows
from alignkd.pipeline.evaluate.statistics import wilson_interval
from alignkd.pipeline.hub.models import model_folder, pin_models, tower_folder
from alignkd.pipeline.runtime.devices import device_words, parse_dtype, pick_device
from alignkd.pipeline.runtime.files import check_out_folder, replace_text
from alignkd.pipeline.runtime.logs import log_start
from alignkd.pipeline.runtime.out_folder.lock import held
from alignkd.pipeline.runtime.progress import progress_bar
from alignkd.pipeline.runtime.signals import StopFlag, stop_on_signals
from alignkd.plugins import load_plugins

_log = logging.getLogger(__name__)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Generate and score. With ``out``, write ``predictions.jsonl`` there as it goes, and ``result.json`` at the end; a run
    that was interrupted is continued with the questions that have no prediction yet.

    Raises:
        AlignkdError: bad input, too many rejected samples, or no question that could be answered.
        Interrupted: a signal came; the same command continues.
    """
    if config.out is not None:
        check_out_folder(Path(config.out))
    check_images(config)
    load_plugins(config.plugins)
    get_metric(config.metric)
    config = pin_models(config)
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        if config.out is not None:
            stack.enter_context(held(Path(config.out), stop.check))
        return _evaluate(config, stop)


def _evaluate(config: EvaluateConfig, stop: StopFlag) -> dict[str, Any]:
    samples = open_samples(config)
    vlm = load_vlm(
        model_folder(config.model),
        dtype=parse_dtype(config.dtype),
        device=pick_device(config.device),
        vision_tower=tower_folder(config.vision_tower),
    )
    template = config.template or vlm.default_template
    preparer = Preparer.of(
        vlm,
        template=template,
        max_length=DEFAULT_MAX_LENGTH,
        prompt_date=prompt_date_of(config),
    )
    log_start(
        "evaluate",
        device=device_words(str(vlm.device)),
        model=config.model,
        data=f"{config.data_words} ({len(samples):,} samples)",
        datasets=samples.datasets or None,
        images=config.images_words,
        plan=f"at most {config.batch_size:,} questions at a time, metric {config.metric}",
        out=config.out,
        template=template,
    )
    rejects = RejectedSamples(config.max_rejected, len(samples))
    with open_predictions(config, vlm, template, preparer.encoder.prompt_date, samples) as predictions:
        correct, answered = _answer_all(config, vlm, preparer, samples, rejects, predictions, stop)
        assert answered, "where every sample is rejected, the last of them ended the run"
        low, high = wilson_interval(correct, answered)
        result = {
            "metric": config.metric,
            "accuracy": correct / answered,
            "interval_95": [low, high],
            "correct": correct,
            "answered": answered,
            "rejected": rejects.count,
            "rejected_samples": rejects.reasons,
        }
        if config.out is not None:
            with explained(Path(config.out), "result.json"):
                replace_text(Path(config.out) / "result.json", json.dumps(result, indent=2) + "\n")
        predictions.end()
    return result


def _answer_all(
    config: EvaluateConfig,
    vlm: Vlm,
    preparer: Preparer,
    samples: Samples,
    rejects: RejectedSamples,
    predictions: Predictions,
    stop: StopFlag,
) -> tuple[int, int]:
    """Predict what has no prediction yet; how many are right, and how many there are, those of before included."""
    metric, done = get_metric(config.metric), len(predictions.kept)
    if done:
        _log.info("evaluate: %d of %d samples are answered already", done, len(samples))
    predictions.check(lambda index: _about(samples[index]))
    answered, correct = done, sum(line["correct"] for line in predictions.kept.values())
    size = WINDOW if vlm.caches_tower else WINDOW_OF_PIXELS
    pending = windows(_groups(samples, predictions.kept), *size)
    batches = Batches(vlm, config.max_new_tokens, BATCH_TOKENS, config.batch_size)
    with progress_bar("evaluate", len(samples), "samples", done=done) as progress:
        stop.check()
        for asked, refused in Questions(vlm, samples, preparer, lambda sample: sample.turns).windows(pending):
            questions = {question.index: question for question in asked if not is_empty(question.sample.turns[-1][1])}
            empty = [(one.index, one.sample, _nothing_in(one.sample)) for one in asked if one.index not in questions]
            unusable = [(one.index, one.sample, one.reason) for one in refused] + empty
            for _, sample, reason in sorted(unusable, key=lambda one: one[0]):
                rejects.add(sample.id or sample.key, reason)
            progress.advance(len(unusable))
            for indices, ask in batches({index: question.input for index, question in questions.items()}):
                texts = zip(indices, ask(), strict=True)
                lines = [{"index": index, **_line(questions[index].sample, text, metric)} for index, text in texts]
                predictions.write(lines)
                answered, correct = answered + len(lines), correct + sum(line["correct"] for line in lines)
                progress.advance(len(lines))
                stop.check()
    return correct, answered


def _groups(samples: Samples, answered: Container[int]) -> list[Group]:
    """Indices of samples without a prediction, those with the same images together; one without images is alone."""
    assert samples.image_hashes is not None, "samples that were opened as data are indexed"
    groups: dict[tuple[int, int], list[int]] = {}
    for index, images in enumerate(samples.image_hashes.tolist()):
        if index not in answered:
            groups.setdefault((images, index if images == NO_IMAGE else 0), []).append(index)
    return [tuple(group) for group in groups.values()]


def _nothing_in(sample: Sample) -> str:
    return f"its last answer is {sample.turns[-1][1]!r}: there is nothing to compare a prediction with"


def _line(sample: Sample, prediction: str, metric: Metric) -> dict[str, Any]:
    """One line of ``predictions.jsonl``: what was asked, with which image, what was said, and what was expected."""
    about = _about(sample)
    reference = about["reference"]
    return {
        "id": about["id"],
        "question": about["question"],
        "image": about["image"],
        "prediction": prediction,
        "reference": reference,
        "answer": reference,  # its name in files of 0.1.0
        "correct": metric(prediction, reference),
    }


def _about(sample: Sample) -> dict[str, Any]:
    """The fields of a line that its sample determines."""
    asked = [text for speaker, text in sample.turns[:-1] if speaker == "human"]
    images = list(sample.images)
    return {
        "id": sample.id,
        "question": asked[-1] if asked else "",
        "image": None if not images else images[0] if len(images) == 1 else images,
        "reference": sample.turns[-1][1] if sample.turns else "",
    }
