"""Attention of several layers: its capture, and the terms that compare it."""

from __future__ import annotations

import pytest
import torch
from exact_logits import ExactTopK, shape_of, targets_of
from tiny_models import batch_of, flat, mixture, sample

from alignkd.capture.attention import capture
from alignkd.capture.layer_pairs import needed_layers
from alignkd.capture.online_teacher import OnlineTeacher
from alignkd.losses.attention_distance import attention_distance, chosen_rows
from alignkd.losses.recipes import RECIPES, Recipe, term_weights
from alignkd.objective import Objective
from alignkd.targets.batch_targets import Targets


def eager_layers(vlm, one):
    """Attention ``[H, T, V]`` of every layer of one sample by the eager kernel."""
    batch = batch_of(vlm, [one])
    before = vlm.model.config.text_config._attn_implementation
    vlm.model.set_attn_implementation({"text_config": "eager"})
    try:
        output = vlm.model(input_ids=batch.input_ids_BS, pixel_values=one.images, output_attentions=True, use_cache=False)
    finally:
        vlm.model.set_attn_implementation({"text_config": before})
    return [a[0][:, batch.text_rows_BT[0]][:, :, batch.vision_columns_BV[0]] for a in output.attentions]


@pytest.mark.parametrize("layers", [(0, 1, 2), (2,), (1, 2)])
def test_captured_layers_equal_those_of_the_eager_kernel(deep, layers):
    samples = mixture(deep)
    batch = batch_of(deep, samples)
    with torch.no_grad():
        captured = capture(deep, batch, layers=layers)
        assert set(captured.attention) == set(layers)
        for i, one in enumerate(samples):
            if not len(one.images):
                continue
            rows, columns = batch.text_mask_BT[i].sum(), batch.vision_mask_BV[i].sum()
            expected = eager_layers(deep, one)
            for layer in layers:
                found = captured.attention[layer][i, :, :rows, :columns]
                torch.testing.assert_close(found, expected[layer], rtol=0, atol=1e-5)


def test_more_layers_change_neither_the_first_nor_anything_else(deep):
    batch = batch_of(deep, mixture(deep))
    with torch.no_grad():
        one, more = capture(deep, batch), capture(deep, batch, layers=(0, 1, 2))
    assert torch.equal(one.attention[0], more.attention[0])
    assert torch.equal(one.hidden_AD, more.hidden_AD)
    assert set(one.attention) == {0}


def test_a_layer_that_is_not_there_cannot_be_captured(deep):
    with pytest.raises(ValueError, match="no attention of layer 3 can be captured"), torch.no_grad():
        capture(deep, batch_of(deep, mixture(deep)), layers=(0, 3))


def test_a_later_layer_sends_gradients_to_its_own_queries_and_to_all_before(deep):
    layers = deep.decoder.layers
    deep.model.zero_grad()
    capture(deep, batch_of(deep, mixture(deep)), layers=(1,)).attention[1].square().sum().backward()
    assert layers[1].self_attn.q_proj.weight.grad.abs().sum() > 0
    assert layers[0].mlp.down_proj.weight.grad.abs().sum() > 0
    assert layers[1].self_attn.o_proj.weight.grad is None
    assert layers[2].self_attn.q_proj.weight.grad is None
    deep.model.zero_grad()


# --- the term ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mse", "kl", "cosine"])
@pytest.mark.parametrize("rows", ["text", "answer", "instruction"])
def test_the_term_of_several_layers_is_the_mean_of_theirs(tiny, deep, kind, rows):
    batch = batch_of(tiny, mixture(tiny))
    targets = targets_of(deep, batch)
    recipe = Recipe("one", supervised=0, attention=1, attention_distance=kind, attention_rows=rows, attention_layers="all")
    objective = Objective(tiny, recipe, shape_of(deep))
    assert objective.layer_pairs == ((0, 0), (1, 2))
    found = flat(objective(batch, targets))["attention"]
    with torch.no_grad():
        student = capture(tiny, batch, layers=(0, 1)).attention
        expected = [
            attention_distance(
                student[layer],
                objective.head_map(targets.attention[teacher_layer]),
                chosen_rows(batch, rows),
                batch.vision_mask_BV,
                kind,
                relative_to_uniform=True,
            ).sum()
            / 5  # samples with text after an image
            for layer, teacher_layer in objective.layer_pairs
        ]
    torch.testing.assert_close(found, sum(expected) / 2, rtol=1e-4, atol=1e-6)
    assert found > 0


def test_recomputed_activations_give_the_same_loss_and_gradients_of_every_layer(tiny, deep):
    batch = batch_of(tiny, mixture(tiny))
    targets, gradients, losses = targets_of(deep, batch), [], []
    objective = Objective(tiny, Recipe("one", supervised=0, attention=1, attention_layers="all"), shape_of(deep))
    objective.train()
    parameters = [p for p in objective.parameters() if p.requires_grad]
    for recomputes in (False, True):
        if recomputes:
            objective.recompute_activations()
        losses.append(objective(batch, targets)["loss"])
        gradients.append(torch.autograd.grad(losses[-1], parameters, allow_unused=True))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    for plain, recomputed in zip(*gradients, strict=True):
        assert (plain is None) == (recomputed is None)
        if plain is not None:
            torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-6)
    assert sum(plain.abs().sum() for plain in gradients[0] if plain is not None) > 0


def test_each_layer_trains_a_head_map_of_its_own_and_the_first_keeps_its_name(tiny, deep):
    batch = batch_of(tiny, mixture(tiny))
    objective = Objective(tiny, Recipe("one", supervised=0, attention=1, attention_layers="0,1"), shape_of(deep))
    objective(batch, targets_of(deep, batch))["loss"].backward()
    moved = {name for name, p in objective.named_parameters() if "head_map" in name and p.grad.abs().sum() > 0}
    assert moved == {"head_map.logits", "other_head_maps.0.logits"}


def test_a_recipe_names_the_teachers_layers_that_it_needs(tiny):
    def needed(**fields):
        return needed_layers(Recipe("one", **fields), tiny, 5)

    assert needed(attention=1.0) == (0,)
    assert needed(attention=1.0, attention_layers="last") == (4,)
    assert needed(attention=1.0, attention_layers="last", vision=1.0) == (0, 4)
    assert needed(attention=1.0, attention_layers="all") == (0, 4)
    assert needed(vision=1.0, attention_layers="all") == (0,)
    assert needed(vision=1.0, vision_focus=0.0) == ()
    with pytest.raises(ValueError, match="attention_layers of the student: layer 7 is wanted, but there are 2"):
        needed(attention=1.0, attention_layers="7")


def test_the_focus_wants_the_first_layer_whatever_layer_is_compared(tiny, deep):
    batch = batch_of(tiny, mixture(tiny))
    targets = targets_of(deep, batch)
    terms = [
        flat(
            Objective(tiny, Recipe("one", attention=1, vision=1, focus_k=2, attention_layers=x), shape_of(deep))(batch, targets)
        )
        for x in ("first", "last")
    ]
    torch.manual_seed(0)
    assert terms[0]["attention"] != terms[1]["attention"]
    assert all(t["vision_focus"].isfinite() for t in terms)


def test_an_online_teacher_gives_the_layers_that_it_is_asked_for(tiny, deep):
    batch = batch_of(tiny, mixture(tiny))
    expected = targets_of(deep, batch)
    source = OnlineTeacher(deep, tiny, attention_layers=(1, 2))
    _, found = source.fill(tiny, batch, Targets(), frozenset({"attention"}))
    assert set(found.attention) == {1, 2}
    for layer in (1, 2):
        torch.testing.assert_close(found.attention[layer], expected.attention[layer])


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_a_finite_loss_and_gradient_also_without_any_image(tiny, deep, name):
    objective = Objective(tiny, RECIPES[name], shape_of(deep), logit_codec=ExactTopK())
    for samples in (mixture(tiny), [sample(tiny, [1, 5, 6, 7, 8])]):
        objective.zero_grad()
        batch = batch_of(tiny, samples)
        outcome = objective(batch, targets_of(deep, batch))
        outcome["loss"].backward()
        assert outcome["loss"].isfinite()
        assert not outcome["bad_B"].any()
        assert set(outcome["terms"]) == {term for term, weight in term_weights(RECIPES[name]).items() if weight > 0}
        assert all(p.grad.isfinite().all() for p in objective.parameters() if p.grad is not None)
