"""How far a student's answers are from those of a cache's teacher, sample by sample.

Shapes: A answers, P of them with a target, T terms.
"""

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import torch

from alignkd.capture.attention import capture, enable_capture
from alignkd.errors import ConfigError
from alignkd.losses.answer_loss import answer_terms
from alignkd.losses.recipes import Recipe, get_recipe
from alignkd.models.vlm import Vlm
from alignkd.pipeline.config.distill import DistillConfig
from alignkd.pipeline.config.rank import RankConfig
from alignkd.pipeline.config.shared import DataSettings
from alignkd.pipeline.feeding.dataset import TrainingExample, TrainingSet
from alignkd.pipeline.feeding.row_checks import MisalignedRowError
from alignkd.pipeline.runtime.devices import parse_dtype
from alignkd.pipeline.runtime.progress import progress_bar
from alignkd.pipeline.runtime.ranks import Worker
from alignkd.pipeline.training.run_inputs import open_data, open_inputs
from alignkd.pipeline.training.teacher_source import open_teachers
from alignkd.targets.batch_targets import DecodedTargets
from alignkd.targets.logit_settings import DIVERGENCE_NAMES
from alignkd.targets.logits import LogitCodec


def divergence_recipe(name_or_file: str) -> Recipe:
    """The logit terms of a recipe alone, every token counting equally.

    Raises:
        ConfigError: it has none, or is not known.
    """
    recipe = get_recipe(name_or_file)
    if not recipe.divergences:
        raise ConfigError(
            f"recipe {recipe.name!r} compares no answer distributions ({', '.join(DIVERGENCE_NAMES)} have weight 0): choose"
            " another --recipe"
        )
    return replace(recipe, supervised=0.0, attention=0.0, vision=0.0, token_weighting="uniform", extra={})


def sample_divergences(config: RankConfig) -> dict[str, float]:
    """The mean over a sample's answer tokens of the recipe's weighted divergence, by the sample's key.

    A sample without an answer that has a target is left out, and so is one that cannot be prepared.

    Raises:
        AlignkdError: the cache does not serve this student and recipe, or too many samples cannot be used.
    """
    assert config.student is not None
    assert config.data
    recipe = divergence_recipe(config.recipe)
    own = ("student", "device", "max_rejected", "vision_tower", "download", "plugins")
    given = {name: getattr(config, name) for name in (*own, *(field.name for field in fields(DataSettings)))}
    inputs = open_inputs(DistillConfig(**given, cache=config.cache, recipe=recipe, out=""), Worker())
    student, codec = inputs.student, open_teachers(inputs)[0].logit_codec
    assert codec is not None, "a recipe with divergences needs logits"
    enable_capture(student)
    student.model.eval()
    data, dtype, found = open_data(inputs), parse_dtype(config.dtype), dict[str, float]()
    with progress_bar("rank", len(data), "samples") as progress, torch.inference_mode():
        for keys, collated in _batches(data, config.batch_size):
            if keys:
                batch = collated["batch"].to(student.device)
                targets = collated["targets"].to(student.device).dequantise()
                with torch.autocast(student.device.type, dtype=dtype, enabled=dtype != torch.float32):
                    means = _means(student, batch, targets, recipe, codec)
                found |= {key: mean for key, mean in zip(keys, means, strict=True) if mean is not None}
            progress.advance(len(keys) + len(collated["failures"]))
    return found


def _batches(data: TrainingSet, size: int) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """The keys of each batch's samples, and the batch; samples that cannot be used are counted, and stop the job if many."""
    for start in range(0, len(data), size):
        positions = list(range(start, min(start + size, len(data))))
        items = data.__getitems__(positions)
        collated = data.collate(items)
        for failure in collated["failures"]:
            if failure.fatal:
                raise MisalignedRowError(failure.reason)
            data.rejects.add(failure.sample_id, failure.reason, key=failure.key)
        good = zip(positions, items, strict=True)
        yield [data.sample(place).key for place, item in good if isinstance(item, TrainingExample)], collated


def _means(student: Vlm, batch: Any, targets: DecodedTargets, recipe: Recipe, codec: LogitCodec) -> list[float | None]:
    """Of each sample; None for one without a target."""
    hidden_AD = capture(student, batch, attention=False).hidden_AD
    chosen = slice(None) if targets.paired_P is None else targets.paired_P
    weights = {name: getattr(recipe, name) for name in recipe.divergences}
    head, owners_P = student.head, batch.answer_samples_A[chosen]
    losses_TP = answer_terms(
        hidden_AD[chosen],
        head.weight,
        batch.answer_ids_A[chosen],
        weights=weights,
        codec=codec,
        values=targets.answers,
        temperature=recipe.temperature,
        divisor=1.0,
        bias_N=head.bias,
    ).losses_TA
    assert losses_TP is not None
    weight_T1 = torch.tensor(list(weights.values()), device=losses_TP.device)[:, None]
    sums_B = torch.zeros(batch.samples, device=losses_TP.device).index_add(0, owners_P, (losses_TP * weight_T1).sum(0).float())
    counts = torch.bincount(owners_P, minlength=batch.samples).tolist()
    return [total / count if count else None for total, count in zip(sums_B.tolist(), counts, strict=True)]
