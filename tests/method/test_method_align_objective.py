"""The objective with targets of some rows, vision tokens and answers only: all others count nowhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from exact_logits import ExactTopK, targets_of
from tiny_models import batch_of, flat, mixture, write_checkpoint

from alignkd.losses.recipes import Recipe
from alignkd.models.loading import load_vlm
from alignkd.objective import Objective, TeacherShape
from alignkd.targets.batch_targets import Targets

RECIPE = Recipe("all", reverse_kl=1.0, forward_kl=0.5, attention=1.0, vision=1.0, vision_focus=0.5, focus_k=2)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "model"
    write_checkpoint(folder, seed=1, hidden_size=32, num_attention_heads=8, num_key_value_heads=8)
    return load_vlm(folder)


@pytest.fixture
def objective(tiny, teacher):
    torch.manual_seed(0)
    return Objective(tiny, RECIPE, TeacherShape(teacher.heads, teacher.hidden_size), logit_codec=ExactTopK())


def gradients(objective, batch, targets):
    objective.zero_grad()
    found = objective(batch, targets)
    found["loss"].backward()
    return flat(found), {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


def chosen(targets, places):
    return {name: values[places] for name, values in targets.answers.items()}


def test_masks_of_everything_change_nothing(tiny, teacher, objective):
    batch = batch_of(tiny, mixture(tiny))
    targets, every = targets_of(teacher, batch), torch.arange(len(batch.answer_ids_A))
    masked = replace(targets, row_mask_BT=batch.text_mask_BT, column_mask_BV=batch.vision_mask_BV)
    masked = replace(masked, paired_P=every, unpaired_U=every[:0])
    expected, found = gradients(objective, batch, targets), gradients(objective, batch, masked)
    for one, other in zip(expected, found, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(other[name], one[name], rtol=1e-5, atol=1e-6)


def test_what_is_masked_counts_nowhere_whatever_it_holds(tiny, teacher, objective):
    batch = batch_of(tiny, mixture(tiny))
    targets, generator = targets_of(teacher, batch), torch.Generator().manual_seed(0)
    rows, columns = (torch.rand(x.shape, generator=generator) < 0.6 for x in (batch.text_mask_BT, batch.vision_mask_BV))
    masked = replace(targets, row_mask_BT=rows, column_mask_BV=columns)
    hidden = (~rows[:, None, :, None] | ~columns[:, None, None, :]).expand_as(targets.attention[0])
    # The focus is chosen by all rows' sums: a row without a target holds zeros.
    attention = targets.attention[0] * rows[:, None, :, None]
    other = replace(
        masked,
        attention={0: attention.masked_fill(hidden & rows[:, None, :, None], 7.0)},
        vision_BVD=targets.vision_BVD.masked_fill(~columns[:, :, None], 7.0),
    )
    expected = gradients(objective, batch, replace(masked, attention={0: attention}))
    found = gradients(objective, batch, other)
    for one, same in zip(expected, found, strict=True):
        for name in one:
            torch.testing.assert_close(same[name], one[name], rtol=1e-5, atol=1e-7)


def test_terms_are_averaged_over_the_samples_that_have_a_target(tiny, teacher, objective):
    batch = batch_of(tiny, mixture(tiny))
    targets = targets_of(teacher, batch)
    rows, columns = torch.ones_like(batch.text_mask_BT), torch.ones_like(batch.vision_mask_BV)
    rows[1], columns[3] = False, False  # the second sample without a row, the fourth without a vision token
    counts = replace(targets, row_mask_BT=rows, column_mask_BV=columns).mask_to_targets(batch).counts()
    assert (counts.with_text_after_image, counts.with_image) == (
        batch.counts().with_text_after_image - 2,
        batch.counts().with_image - 1,
    )
    found = flat(objective(batch, replace(targets, row_mask_BT=rows, column_mask_BV=columns)))
    alone = [flat(objective(one, targets_of(teacher, one))) for one in (batch_of(tiny, [x]) for x in mixture(tiny))]
    expected = sum(alone[i]["attention"] for i in (0, 4, 5)) / 3
    torch.testing.assert_close(found["attention"], expected, rtol=1e-4, atol=1e-6)
    expected = sum(alone[i]["vision_all"] for i in (0, 1, 4, 5)) / 4
    torch.testing.assert_close(found["vision_all"], expected, rtol=1e-4, atol=1e-6)


def test_answers_without_a_target_have_the_supervised_term_alone(tiny, teacher, objective):
    batch = batch_of(tiny, mixture(tiny))
    targets, answers = targets_of(teacher, batch), len(batch.answer_ids_A)
    paired = torch.tensor([i for i in range(answers) if i % 3])
    unpaired = torch.arange(0, answers, 3)
    part = replace(targets, answers=chosen(targets, paired), paired_P=paired, unpaired_U=unpaired)
    rest = replace(targets, answers=chosen(targets, unpaired), paired_P=unpaired, unpaired_U=paired)
    whole, found, other = (gradients(objective, batch, x) for x in (targets, part, rest))
    torch.testing.assert_close(found[0]["supervised"], whole[0]["supervised"], rtol=1e-5, atol=1e-6)
    for term in ("reverse_kl", "forward_kl"):
        torch.testing.assert_close(found[0][term] + other[0][term], whole[0][term], rtol=1e-5, atol=1e-6)
        assert 0 < found[0][term] < whole[0][term]
    nothing = Objective(tiny, replace(RECIPE, reverse_kl=0.0, forward_kl=0.0), TeacherShape(8, 32))
    nothing.load_state_dict(objective.state_dict(), strict=False)
    without = gradients(nothing, batch, targets)[1]
    # Both halves hold all other terms: their gradients add up to the whole's and one without divergences.
    for name, gradient in whole[1].items():
        torch.testing.assert_close(found[1][name] + other[1][name], gradient + without[name], rtol=1e-3, atol=1e-5)
    assert found[0]["loss"].isfinite()


def test_masks_and_places_move_with_the_targets(tiny, teacher):
    targets = Targets(
        row_mask_BT=torch.ones(1, 2), column_mask_BV=torch.ones(1, 3), paired_P=torch.ones(4), unpaired_U=torch.ones(5)
    )
    moved = targets.to("meta")
    for name in ("row_mask_BT", "column_mask_BV", "paired_P", "unpaired_U"):
        assert getattr(moved, name).device.type == "meta"
        assert getattr(moved, name).shape == getattr(targets, name).shape
