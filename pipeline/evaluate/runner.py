"""Accuracy of a model on a question file: generate the last answer of each sample, and compare it with the file's."""

import hashlib
import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignkd.errors import SampleError
from alignkd.inputs.batch import ModelInput
from alignkd.models.loading import load_vlm
from alignkd.models.vlm import Vlm
from alignkd.pipeline.config.evaluate import EvaluateConfig
from alignkd.pipeline.config.shared import DEFAULT_MAX_LENGTH
from alignkd.pipeline.data.contract import Samples
from alignkd.pipeline.data.open_samples import check_images, open_samples
from alignkd.pipeline.data.preparer import Preparer
from alignkd.pipeline.data.rejected_samples import RejectedSamples
from alignkd.pipeline.data.sample import Sample
from alignkd.pipeline.data.tower_features import tower_features
from alignkd.pipeline.evaluate.metrics import Metric, get_metric, is_empty
from alignkd.pipeline.evaluate.running.predictions import Predictions, explained, open_predictions, prompt_date_of
from alignkd.pipeline.evaluate.running.prefix import answer_sharing as answer
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


@dataclass(frozen=True)
class _Question:
    sample: Sample
    input: ModelInput


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
        plan=f"{config.batch_size:,} questions at a time, metric {config.metric}",
        out=config.out,
        template=template,
    )
    rejects = RejectedSamples(config.max_rejected, len(samples))
    keys = hashlib.sha256(samples.keys.tobytes()).hexdigest()
    with open_predictions(config, vlm, template, preparer.encoder.prompt_date, keys) as predictions:
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
    metric = get_metric(config.metric)
    correct = answered = 0
    if predictions.kept:
        _log.info("evaluate: %d of %d samples are answered already", len(predictions.kept), len(samples))
    with progress_bar("evaluate", len(samples), "samples") as progress:
        for start in range(0, len(samples), config.batch_size):
            stop.check()
            batch = [samples[i] for i in range(start, min(start + config.batch_size, len(samples)))]
            there = [(sample, predictions.take(_about(sample)) if not sample.fault else None) for sample in batch]
            lines = [line for _, line in there if line is not None]
            questions = _questions(vlm, [sample for sample, line in there if line is None], preparer, rejects)
            if questions:
                texts = answer(vlm, [question.input for question in questions], config.max_new_tokens)
                made = [_line(q.sample, text, metric) for q, text in zip(questions, texts, strict=True)]
                predictions.write(made)
                lines += made
            answered += len(lines)
            correct += sum(line["correct"] for line in lines)
            progress.advance(len(batch))
    predictions.check_all_taken()
    return correct, answered


def _questions(vlm: Vlm, samples: Sequence[Sample], preparer: Preparer, rejects: RejectedSamples) -> list[_Question]:
    preparer.features = {}
    if vlm.caches_tower:  # benchmarks ask many questions about one image: the tower runs once for it in a batch
        preparer.features = tower_features(vlm, preparer, list(dict.fromkeys(p for s in samples for p in preparer.places(s))))
    questions = []
    for sample in samples:
        try:
            question = _Question(sample, _with_shared_features(preparer.question(sample), sample, preparer))
            _check_reference(sample)
            questions.append(question)
        except SampleError as error:
            rejects.add(sample.id or sample.key, str(error))
    return questions


def _with_shared_features(made: ModelInput, sample: Sample, preparer: Preparer) -> ModelInput:
    """Questions about one picture hold its features, and not a copy each."""
    places = preparer.places(sample)
    found = preparer.features.get(places[0]) if len(places) == 1 else None
    return made if found is None else replace(made, images=found[1].values[None])


def _check_reference(sample: Sample) -> None:
    reference = sample.turns[-1][1]
    if is_empty(reference):
        raise SampleError(f"its last answer is {reference!r}: there is nothing to compare a prediction with")


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
