"""Accuracy of a model on a question file: generate the last answer of each sample, and compare it with the file's."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from alignkd.errors import SampleError
from alignkd.inputs.batch import ModelInput
from alignkd.models.loading import load_vlm
from alignkd.models.vlm import Vlm
from alignkd.pipeline.config.evaluate import EvaluateConfig
from alignkd.pipeline.config.shared import DEFAULT_MAX_LENGTH
from alignkd.pipeline.data.image_paths import check_image_folder
from alignkd.pipeline.data.preparer import Preparer
from alignkd.pipeline.data.rejected_samples import RejectedSamples
from alignkd.pipeline.data.sample import Sample
from alignkd.pipeline.data.samples import SampleFile
from alignkd.pipeline.data.tower_features import tower_features
from alignkd.pipeline.evaluate.metrics import Metric, get_metric, is_empty
from alignkd.pipeline.runtime.devices import device_words, parse_dtype, pick_device
from alignkd.pipeline.runtime.files import check_out_folder, replace_text
from alignkd.pipeline.runtime.logs import log_start
from alignkd.pipeline.runtime.out_folder.write_faults import explained_write_faults
from alignkd.pipeline.runtime.printable import json_text
from alignkd.pipeline.runtime.progress import progress_bar
from alignkd.pipeline.runtime.run_record import write_run_record
from alignkd.plugins import load_plugins


@dataclass(frozen=True)
class _Question:
    sample: Sample
    input: ModelInput


def wilson_interval(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson's score interval)."""
    if total == 0:
        return 0.0, 1.0
    p, n = correct / total, total
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return centre - half, centre + half


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Generate and score. With ``out``, write ``predictions.jsonl`` there as it goes, and ``result.json`` at the end.

    Raises:
        AlignkdError: bad input, too many rejected samples, or no question that could be answered.
    """
    if config.out is not None:
        check_out_folder(Path(config.out))
    check_image_folder(config.images)
    load_plugins(config.plugins)
    metric = get_metric(config.metric)
    samples = SampleFile(config.data)
    tower = Path(config.vision_tower) if config.vision_tower else None
    vlm = load_vlm(config.model, dtype=parse_dtype(config.dtype), device=pick_device(config.device), vision_tower=tower)
    template = config.template or vlm.default_template
    preparer = Preparer.of(
        vlm,
        template=template,
        max_length=DEFAULT_MAX_LENGTH,
        image_root=config.images,
        prompt_date=config.prompt_date,
    )
    log_start(
        "evaluate",
        device=device_words(str(vlm.device)),
        model=config.model,
        data=f"{config.data} ({len(samples):,} samples)",
        images=config.images,
        plan=f"{config.batch_size:,} questions at a time, metric {config.metric}",
        out=config.out,
        template=template,
    )
    rejects = RejectedSamples(config.max_rejected, len(samples))
    correct = answered = 0
    with _predictions(config) as write, progress_bar("evaluate", len(samples), "samples") as progress:
        for start in range(0, len(samples), config.batch_size):
            indices = range(start, min(start + config.batch_size, len(samples)))
            questions = _questions(vlm, [samples[i] for i in indices], preparer, rejects)
            if questions:
                predictions = answer(vlm, [question.input for question in questions], config.max_new_tokens)
                lines = [_line(q.sample, p, metric) for q, p in zip(questions, predictions, strict=True)]
                write(lines)
                answered += len(lines)
                correct += sum(line["correct"] for line in lines)
            progress.advance(len(indices))
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
        with _explained(Path(config.out), "result.json"):
            replace_text(Path(config.out) / "result.json", json.dumps(result, indent=2) + "\n")
    return result


@contextmanager
def _predictions(config: EvaluateConfig) -> Iterator[Callable[[Sequence[Mapping[str, Any]]], None]]:
    """What writes lines of ``predictions.jsonl``; each batch is in the file before the next one is generated."""
    if config.out is None:
        yield lambda _: None
        return
    out = Path(config.out)
    with _explained(out, "run.json"):
        write_run_record(out / "run.json", "evaluate", asdict(config))
        (out / "result.json").unlink(missing_ok=True)  # of an earlier run, whose predictions are written over
        file = (out / "predictions.jsonl").open("wb", buffering=0)  # a buffer's rest would fail once more when it is closed
    with file:

        def write(lines: Sequence[Mapping[str, Any]]) -> None:
            left = memoryview("".join(json_text(line) + "\n" for line in lines).encode())
            with _explained(out, "predictions.jsonl"):
                while left:
                    left = left[file.write(left) :]

        yield write


def _explained(out: Path, what: str) -> AbstractContextManager[None]:
    return explained_write_faults(out, what, again="run the same command again")


def _questions(vlm: Vlm, samples: Sequence[Sample], preparer: Preparer, rejects: RejectedSamples) -> list[_Question]:
    preparer.features = {}
    if vlm.caches_tower:  # benchmarks ask many questions about one image: the tower runs once for it in a batch
        preparer.features = tower_features(vlm, preparer, list(dict.fromkeys(ref for s in samples for ref in s.images)))
    questions = []
    for sample in samples:
        try:
            question = _Question(sample, preparer.question(sample))
            _check_reference(sample)
            questions.append(question)
        except SampleError as error:
            rejects.add(sample.id or sample.key, str(error))
    return questions


def _check_reference(sample: Sample) -> None:
    reference = sample.turns[-1][1]
    if is_empty(reference):
        raise SampleError(f"its last answer is {reference!r}: there is nothing to compare a prediction with")


@torch.inference_mode()
def answer(vlm: Vlm, questions: Sequence[ModelInput], max_new_tokens: int) -> list[str]:
    """Answers to a batch of questions, by greedy decoding."""
    # Padded on the left, so that generation continues the prompt.
    batch = vlm.collate(questions, pad_left=True).to(vlm.device)
    output = vlm.model.generate(
        input_ids=batch.input_ids_BS,
        attention_mask=batch.attention_mask_BS.long(),
        **vlm.generation_inputs(batch),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=vlm.end_token_ids,
        pad_token_id=vlm.pad_token_id,
    )
    new_ids = output[:, batch.input_ids_BS.shape[1] :].tolist()
    return [vlm.answer_text(ids) for ids in new_ids]


def _line(sample: Sample, prediction: str, metric: Metric) -> dict[str, Any]:
    """One line of ``predictions.jsonl``: what was asked, with which image, what was said, and what was expected."""
    reference = sample.turns[-1][1]
    asked = [text for speaker, text in sample.turns[:-1] if speaker == "human"]
    images = list(sample.images)
    return {
        "id": sample.id,
        "question": asked[-1] if asked else "",
        "image": None if not images else images[0] if len(images) == 1 else images,
        "prediction": prediction,
        "reference": reference,
        "answer": reference,  # its name in files of 0.1.0
        "correct": metric(prediction, reference),
    }
