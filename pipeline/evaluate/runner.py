"""Accuracy of a model on a question file: generate the last answer of each sample, and compare it with the file's."""

import json
import math
from collections.abc import Sequence
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
from alignkd.pipeline.data.preparer import Preparer
from alignkd.pipeline.data.rejected_samples import RejectedSamples
from alignkd.pipeline.data.sample import Sample
from alignkd.pipeline.data.samples import SampleFile
from alignkd.pipeline.data.tower_features import tower_features
from alignkd.pipeline.evaluate.metrics import Metric, get_metric
from alignkd.pipeline.runtime.devices import parse_dtype, pick_device
from alignkd.pipeline.runtime.files import check_out_folder, replace_text
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
    """Generate and score. With ``out``, write ``predictions.jsonl`` and ``result.json`` there.

    Raises:
        AlignkdError: bad input, or too many rejected samples.
    """
    if config.out is not None:
        check_out_folder(Path(config.out))
    load_plugins(config.plugins)
    metric = get_metric(config.metric)
    samples = SampleFile(config.data)
    tower = Path(config.vision_tower) if config.vision_tower else None
    vlm = load_vlm(config.model, dtype=parse_dtype(config.dtype), device=pick_device(config.device), vision_tower=tower)
    template = config.template or vlm.default_template
    preparer = Preparer.of(vlm, template=template, max_length=DEFAULT_MAX_LENGTH, image_root=config.images)
    rejects = RejectedSamples(config.max_rejected)
    lines: list[dict[str, Any]] = []
    with progress_bar("evaluate", len(samples), "samples") as progress:
        for start in range(0, len(samples), config.batch_size):
            indices = range(start, min(start + config.batch_size, len(samples)))
            questions = _questions(vlm, [samples[i] for i in indices], preparer, rejects)
            if questions:
                predictions = answer(vlm, [question.input for question in questions], config.max_new_tokens)
                lines += [_line(q.sample, p, metric) for q, p in zip(questions, predictions, strict=True)]
            progress.advance(len(indices))
    correct = sum(line["correct"] for line in lines)
    low, high = wilson_interval(correct, len(lines))
    result = {
        "metric": config.metric,
        "accuracy": correct / max(len(lines), 1),
        "interval_95": [low, high],
        "correct": correct,
        "answered": len(lines),
        "rejected": rejects.count,
        "rejected_samples": rejects.reasons,
    }
    if config.out is not None:
        _write(Path(config.out), config, lines, result)
    return result


def _questions(vlm: Vlm, samples: Sequence[Sample], preparer: Preparer, rejects: RejectedSamples) -> list[_Question]:
    preparer.features = {}
    if vlm.caches_tower:  # benchmarks ask many questions about one image: the tower runs once for it in a batch
        preparer.features = tower_features(vlm, preparer, list(dict.fromkeys(ref for s in samples for ref in s.images)))
    questions = []
    for sample in samples:
        try:
            questions.append(_Question(sample, preparer.question(sample)))
        except SampleError as error:
            rejects.add(sample.id or sample.key, str(error))
    return questions


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
    expected = sample.turns[-1][1]
    return {"id": sample.id, "prediction": prediction, "answer": expected, "correct": metric(prediction, expected)}


def _write(out: Path, config: EvaluateConfig, lines: list[dict[str, Any]], result: dict[str, Any]) -> None:
    write_run_record(out / "run.json", "evaluate", asdict(config))
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    # An id may hold half of a surrogate pair, which UTF-8 cannot; backslashreplace writes JSON's own escape for it.
    (out / "predictions.jsonl").write_text(text, errors="backslashreplace")
    replace_text(out / "result.json", json.dumps(result, indent=2) + "\n")
