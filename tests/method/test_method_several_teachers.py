"""Several teachers in one objective: each sample's loss is the weighted mean over its teachers, whatever batch it is in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from exact_logits import ExactTopK, shape_of, targets_of
from tiny_models import batch_of, flat, mixture, write_checkpoint

from alignkd.capture.teacher import Teacher
from alignkd.inputs.batch import Counts
from alignkd.losses import term_registry
from alignkd.losses.custom_terms import register_term
from alignkd.losses.recipes import RECIPES, get_recipe
from alignkd.models.loading import load_vlm
from alignkd.objective import Objective
from alignkd.targets.batch_targets import Targets
from alignkd.targets.several import combine

RECIPE = replace(RECIPES["align-kd"], focus_k=2)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Two of other widths, heads and depths than the student's."""
    folder = tmp_path_factory.mktemp("teachers")
    shapes = {"a": (32, 8, 3), "b": (40, 2, 4)}
    for seed, (name, (width, heads, layers)) in enumerate(shapes.items(), start=1):
        sizes = {"num_attention_heads": heads, "num_key_value_heads": heads, "num_hidden_layers": layers}
        write_checkpoint(folder / name, seed=seed, hidden_size=width, **sizes)
    return [load_vlm(folder / name) for name in shapes]


def objective_of(tiny, teachers, recipe=RECIPE, **settings):
    torch.manual_seed(0)
    first, *others = (Teacher(None, ExactTopK(), shape_of(teacher)) for teacher in teachers)
    objective = Objective(tiny, recipe, first.shape, None, first.logit_codec, others, **settings)
    for parameter in objective.parameters():  # the adapters start regular; here no two of their weights are equal
        if parameter.requires_grad and parameter.dim() < 3:
            parameter.data += 0.01 * torch.randn_like(parameter)
    return objective.train()


def masked(targets, batch, mine_B):
    """Targets of some of the samples: what a cache that holds those alone gives."""
    if mine_B.all():
        return targets
    mine = torch.from_numpy(mine_B)
    mine_A = mine[batch.answer_samples_A]
    paired_P, unpaired_U = mine_A.nonzero()[:, 0], (~mine_A).nonzero()[:, 0]
    return Targets(
        {layer: values * mine[:, None, None, None] for layer, values in targets.attention.items()},
        targets.vision_BVD * mine[:, None, None],
        {name: values[paired_P] for name, values in targets.answers.items()},
        targets.advantage_A[paired_P],
        row_mask_BT=mine[:, None].expand_as(batch.text_mask_BT).clone(),
        column_mask_BV=mine[:, None].expand_as(batch.vision_mask_BV).clone(),
        paired_P=paired_P,
        unpaired_U=unpaired_U,
    )


def several(teachers, batch, weights_KB):
    """The targets of teachers with the given weights: rows of theirs where the weight is above 0."""
    found = [
        masked(targets_of(teacher, batch), batch, weight_B > 0) if (weight_B > 0).any() else None
        for teacher, weight_B in zip(teachers, weights_KB, strict=True)
    ]
    return combine(found, np.asarray(weights_KB, dtype=np.float64), batch)


def gradients(objective, loss):
    objective.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


WEIGHTS = np.array([[1, 0, 0.25, 0.5, 0, 1], [0, 1, 0.75, 0.5, 1, 0]])
"""Of six samples: some of one teacher, some of both."""


@pytest.mark.parametrize("recipe", [RECIPE, replace(RECIPE, token_weighting="advantage")], ids=["uniform", "advantage"])
def test_a_batch_of_mixed_teachers_is_its_samples_one_by_one(tiny, teachers, recipe):
    samples = mixture(tiny)
    assert len(samples) == WEIGHTS.shape[1]
    objective, batch = objective_of(tiny, teachers, recipe), batch_of(tiny, samples)
    targets = several(teachers, batch, WEIGHTS)
    counts = targets.counts(batch)
    together = objective(batch, targets, counts)
    whole = gradients(objective, together["loss"])
    added, sums, terms = {}, dict.fromkeys(together["of_teachers"], 0.0), dict.fromkeys(together["terms"], 0.0)
    for place, one in enumerate(samples):
        alone = batch_of(tiny, [one])
        found = objective(alone, several(teachers, alone, WEIGHTS[:, [place]]), counts)
        for name, gradient in gradients(objective, found["loss"]).items():
            added[name] = added.get(name, 0) + gradient
        terms = {name: terms[name] + value for name, value in found["terms"].items()}
        sums = {name: before + found["of_teachers"].get(name, 0.0) for name, before in sums.items()}
    assert added.keys() == whole.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(added[name], gradient, rtol=2e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(terms, together["terms"], rtol=1e-5, atol=1e-6)
    for name, value in sums.items():
        if not name.startswith("attention_contrast"):
            torch.testing.assert_close(value, together["of_teachers"][name], rtol=1e-5, atol=1e-6)


def test_every_sample_and_answer_counts_once_however_many_teachers_it_has(tiny, teachers):
    batch = batch_of(tiny, mixture(tiny))
    counts = several(teachers, batch, WEIGHTS).counts(batch)
    plain = batch.counts()
    assert (counts.answers, counts.samples) == (plain.answers, plain.samples)
    assert counts.with_image == pytest.approx(plain.with_image)
    assert counts.with_text_after_image == pytest.approx(plain.with_text_after_image)


def test_what_a_teacher_has_no_target_for_does_not_count_for_it(tiny, teachers):
    batch = batch_of(tiny, mixture(tiny))
    both = np.full((2, batch.samples), 0.5)
    first, second = (targets_of(teacher, batch) for teacher in teachers)
    nothing = replace(second, column_mask_BV=torch.zeros_like(batch.vision_mask_BV))
    targets = combine([first, nothing], both, batch)
    assert targets.counts(batch).with_image == batch.counts().with_image / 2
    assert targets.taught[1].with_image == 0
    objective = objective_of(tiny, teachers)
    found, alone = objective(batch, targets), objective_of(tiny, teachers[:1])(batch, first)
    # The mean over samples that have the term from a teacher: of one teacher alone it is that teacher's.
    torch.testing.assert_close(found["of_teachers"]["vision_all/teacher2"], torch.tensor(0.0))
    torch.testing.assert_close(
        found["terms"]["vision_all"] * targets.counts(batch).with_image * 2,
        found["of_teachers"]["vision_all/teacher1"],
    )
    assert alone["terms"].keys() == found["terms"].keys()


def test_one_teacher_of_two_gives_the_loss_of_that_teacher_to_the_bit(tiny, teachers):
    batch = batch_of(tiny, mixture(tiny))
    weights = np.stack([np.ones(batch.samples), np.zeros(batch.samples)])
    two, one = objective_of(tiny, teachers), objective_of(tiny, teachers[:1])
    one.load_state_dict(two.state_dict(), strict=False)
    found, alone = two(batch, several(teachers, batch, weights)), one(batch, targets_of(teachers[0], batch))
    assert torch.equal(found["loss"], alone["loss"])
    assert all(torch.equal(found["terms"][name], value) for name, value in alone["terms"].items())
    whole, expected = gradients(two, found["loss"]), gradients(one, alone["loss"])
    assert all(torch.equal(whole[name], gradient) for name, gradient in expected.items())
    rest = whole.keys() - expected.keys()
    assert rest
    assert all(name.startswith("others.0.") and not whole[name].any() for name in rest)


def test_the_average_of_two_teachers_is_the_mean_of_the_two_losses(tiny, teachers):
    batch = batch_of(tiny, mixture(tiny))
    both = objective_of(tiny, teachers)
    found = both(batch, several(teachers, batch, np.full((2, batch.samples), 0.5)))
    losses = []
    for number in range(2):
        weights = np.zeros((2, batch.samples))
        weights[number] = 1
        losses.append(both(batch, several(teachers, batch, weights)))
    mean = sum(flat(one)["loss"] for one in losses) / 2
    torch.testing.assert_close(found["loss"], mean, rtol=1e-5, atol=1e-6)
    for name, value in found["terms"].items():
        torch.testing.assert_close(value, (losses[0]["terms"][name] + losses[1]["terms"][name]) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["align-kd", "paper", "compodistill", "llavadi-forward", "beta-kd"])
def test_every_adapter_is_in_the_graph_of_a_batch_without_its_teacher(tiny, teachers, name):
    objective = objective_of(tiny, teachers, RECIPES[name], keep_all_parameters_in_graph=True)
    batch = batch_of(tiny, mixture(tiny))
    for absent in (0, 1):
        weights = np.ones((2, batch.samples))
        weights[absent] = 0
        found = objective(batch, several(teachers, batch, weights))
        assert found["loss"].isfinite()
        given = gradients(objective, found["loss"])
        trained = {name for name, p in objective.named_parameters() if p.requires_grad}
        assert given.keys() == trained
        assert all(gradient.isfinite().all() for gradient in given.values())


def test_a_batch_of_text_alone_is_finite_for_two_teachers(tiny, teachers):
    samples = [one for one in mixture(tiny) if not len(one.images)]
    batch = batch_of(tiny, samples)
    objective = objective_of(tiny, teachers, keep_all_parameters_in_graph=True)
    found = objective(batch, several(teachers, batch, np.full((2, batch.samples), 0.5)))
    assert found["loss"].isfinite()
    assert not found["bad_B"].any()
    assert found["terms"]["attention"] == found["terms"]["vision_all"] == 0


def test_a_term_that_is_not_finite_is_that_of_the_samples_of_its_teacher(tiny, teachers):
    batch = batch_of(tiny, mixture(tiny))
    targets = several(teachers, batch, WEIGHTS)
    vision_BVD = targets.teachers[1].vision_BVD.masked_fill(batch.samples_with_image()[:, None, None], torch.nan)
    broken = replace(targets.teachers[1], vision_BVD=vision_BVD)
    found = objective_of(tiny, teachers)(batch, replace(targets, teachers=(targets.teachers[0], broken)))
    with_image = batch.samples_with_image().numpy()
    assert found["bad_B"].tolist() == ((WEIGHTS[1] > 0) & with_image).tolist()


def test_the_agreement_is_over_the_answers_of_all_teachers(tiny, teachers):
    batch = batch_of(tiny, mixture(tiny))
    objective = objective_of(tiny, teachers)
    found = objective(batch, several(teachers, batch, WEIGHTS), with_agreement=True)["agreement"]
    answers = np.bincount(batch.answer_samples_A.numpy(), minlength=batch.samples)
    assert found[1] == ((WEIGHTS > 0).sum(axis=0) * answers).sum()


def test_a_loss_of_a_step_of_two_batches_adds_up(tiny, teachers):
    samples, objective = mixture(tiny), objective_of(tiny, teachers)
    parts = [batch_of(tiny, samples[:2]), batch_of(tiny, samples[2:])]
    given = [several(teachers, part, weights) for part, weights in zip(parts, np.split(WEIGHTS, [2], axis=1), strict=True)]
    names = ("answers", "with_text_after_image", "with_image", "samples")
    mine = [targets.counts(part) for targets, part in zip(given, parts, strict=True)]
    counts = Counts(**{name: sum(getattr(one, name) for one in mine) for name in names})
    losses = [objective(part, targets, counts)["loss"] for part, targets in zip(parts, given, strict=True)]
    batch = batch_of(tiny, samples)
    torch.testing.assert_close(sum(losses), objective(batch, several(teachers, batch, WEIGHTS))["loss"], rtol=1e-5, atol=1e-6)


def test_a_term_from_outside_the_package_has_parameters_for_each_teacher(tiny, teachers, monkeypatch):
    monkeypatch.setattr(term_registry, "_TERMS", {})

    @register_term("scale", needs=("vision",), averaged_over="samples")
    class Scale(torch.nn.Module):
        def __init__(self, shapes):
            super().__init__()
            self.weights = torch.nn.Parameter(torch.ones(shapes.teacher.width))

        def forward(self, inputs):
            return 1 + (inputs.targets.vision_BVD * self.weights).square().mean(dim=(1, 2))

    objective = objective_of(tiny, teachers, get_recipe("sft", {"scale": "1"}))
    batch = batch_of(tiny, mixture(tiny))
    found = objective(batch, several(teachers, batch, WEIGHTS))
    with torch.no_grad():
        values = [
            1 + (targets_of(teacher, batch).vision_BVD * module.extra_terms.term_scale.weights).square().mean(dim=(1, 2))
            for teacher, module in zip(teachers, objective.teachers, strict=True)
        ]
    expected = sum((value_B * torch.from_numpy(weight_B)).sum() for value_B, weight_B in zip(values, WEIGHTS, strict=True))
    torch.testing.assert_close(found["terms"]["scale"], (expected / batch.samples).float(), rtol=1e-5, atol=1e-6)
    widths = [module.extra_terms.term_scale.weights.shape for module in objective.teachers]
    assert widths == [(teacher.hidden_size,) for teacher in teachers]
