"""The objective: which parameter each term moves, chunks, adapters that cannot collapse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from exact_logits import ExactTopK, reverse_kl, shape_of, targets_of
from tiny_models import batch_of, flat, mixture, sample, write_checkpoint
from torch.nn import functional

from alignkd.capture.attention import capture
from alignkd.losses.recipes import RECIPES, TERMS, Recipe, term_weights
from alignkd.losses.terms import attention_loss, focus_mask, vision_loss
from alignkd.models.loading import load_vlm
from alignkd.models.vlm import module_fingerprint
from alignkd.objective import Objective, TeacherShape
from alignkd.targets.batch_targets import Targets


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A wider teacher with more heads."""
    folder = tmp_path_factory.mktemp("teacher") / "model"
    write_checkpoint(folder, seed=1, hidden_size=32, num_attention_heads=8, num_key_value_heads=8, num_hidden_layers=3)
    return load_vlm(folder)


def run(tiny, teacher, recipe, samples=None):
    objective = Objective(tiny, recipe, shape_of(teacher), logit_codec=ExactTopK())
    objective.train()
    batch = batch_of(tiny, mixture(tiny) if samples is None else samples)
    terms = flat(objective(batch, targets_of(teacher, batch)))
    terms["loss"].backward()
    return objective, terms


def moved(objective):
    """The parameters that a loss moves."""
    return {name for name, p in objective.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


LAYER = "student.model.language_model.layers.{}."
Q_AND_K = {LAYER.format(0) + f"self_attn.{n}_proj.weight" for n in "qk"}
PROJECTOR = "student.model.multi_modal_projector."
ALONE = {
    "supervised": Recipe("one", supervised=1),
    "reverse_kl": Recipe("one", supervised=0, reverse_kl=1),
    "attention": Recipe("one", supervised=0, attention=1),
    "vision": Recipe("one", supervised=0, vision=1, vision_focus=0),
    "vision and focus": Recipe("one", supervised=0, vision=1, vision_focus=0.5, focus_k=2),
}


def names(objective, *prefixes):
    return {name for name, _ in objective.named_parameters() if name.startswith(prefixes)}


@pytest.mark.parametrize("term", ["supervised", "reverse_kl"])
def test_answer_terms_reach_everything_but_the_tower(tiny, teacher, term):
    # Logits depend on every layer, on the vision tokens in the prompt and on the output head; no adapter is in between.
    objective, _ = run(tiny, teacher, ALONE[term])
    everything = {name for name, _ in objective.named_parameters() if ".vision_tower." not in name}
    assert moved(objective) == everything
    assert everything >= Q_AND_K
    assert objective.head_map is None
    assert objective.width_map is None


def test_the_attention_term_reaches_what_makes_the_first_scores_and_nothing_after(tiny, teacher):
    # Rows come from text embeddings, columns from the projector; both pass the first norm and layer 0's q and k. The head
    # mixture is trained. Values, outputs, later layers and the head come after the probabilities.
    objective, _ = run(tiny, teacher, ALONE["attention"])
    expected = Q_AND_K | {LAYER.format(0) + "input_layernorm.weight", "student.model.language_model.embed_tokens.weight"}
    expected |= names(objective, PROJECTOR, "head_map.")
    assert moved(objective) == expected


@pytest.mark.parametrize("head_map", ["mixture", "convolution", "mean"])
def test_the_attention_term_trains_the_head_map_that_has_weights(tiny, teacher, head_map):
    objective, _ = run(tiny, teacher, Recipe("one", supervised=0, attention=1, head_map=head_map))
    assert {n for n in moved(objective) if n.startswith("head_map.")} == names(objective, "head_map.")
    assert bool(names(objective, "head_map.")) == (head_map != "mean")
    assert moved(objective) >= Q_AND_K


@pytest.mark.parametrize("term", ["vision", "vision and focus"])
def test_the_vision_terms_reach_the_projector_and_the_width_map_alone(tiny, teacher, term):
    # Vision tokens exist before the language model: no decoder weight can change them.
    objective, _ = run(tiny, teacher, ALONE[term])
    assert moved(objective) == names(objective, PROJECTOR, "width_map.")
    assert names(objective, "width_map.") == {"width_map.map.weight", "width_map.map.bias"}


@pytest.mark.parametrize("recipe", [*ALONE.values(), *RECIPES.values()], ids=[*ALONE, *RECIPES])
def test_no_term_reaches_the_tower_or_the_teacher(tiny, teacher, recipe):
    before = module_fingerprint(tiny.tower), teacher.weights_fingerprint()
    objective, terms = run(tiny, teacher, recipe)
    assert terms["loss"].isfinite()
    assert all(p.grad is None and not p.requires_grad for p in tiny.tower.parameters())
    assert all(p.grad is None for p in teacher.model.parameters())
    assert not tiny.tower.training
    assert objective.student.model.language_model.training
    trained = [p for p in objective.parameters() if p.requires_grad]
    torch.optim.SGD(trained, lr=0.1).step()
    assert (module_fingerprint(tiny.tower), teacher.weights_fingerprint()) == before


def test_every_term_is_the_function_of_its_name(tiny, teacher):
    recipe = replace(RECIPES["align-kd"], focus_k=2)
    objective, terms = run(tiny, teacher, recipe)
    batch = batch_of(tiny, mixture(tiny))
    targets = targets_of(teacher, batch)
    with torch.no_grad():
        captured = capture(tiny, batch)
        logits = tiny.model.lm_head(captured.hidden_AD)
        masks = batch.text_mask_BT, batch.vision_mask_BV
        vision = objective.width_map.map(captured.vision_BVD), targets.vision_BVD
        focus = focus_mask(targets.attention[0], masks[1], 2)
        attended, seen = int((masks[0].any(1) & masks[1].any(1)).sum()), int(masks[1].any(1).sum())
        expected = {
            "supervised": functional.cross_entropy(logits, batch.answer_ids_A),
            "reverse_kl": reverse_kl(logits, *targets.answers.values()).mean(),
            "attention": attention_loss(
                captured.attention[0], objective.head_map(targets.attention[0]), *masks, relative_to_uniform=True
            ).sum()
            / attended,
            "vision_all": vision_loss(*vision, masks[1], masks[1], relative_to_variance=True).sum()
            / int(masks[1].any(1).sum()),
            "vision_focus": vision_loss(*vision, focus, masks[1], relative_to_variance=True).sum() / seen,
        }
    assert set(terms) == {"loss", *expected}
    assert set(expected) == {name for name, weight in term_weights(recipe).items() if weight > 0}
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-5, atol=1e-6)
        assert not terms[name].requires_grad
    weights = term_weights(recipe)
    total = sum(weights[name] * terms[name] for name in expected)
    torch.testing.assert_close(terms["loss"].detach(), total, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_needs_no_target_but_those_it_names(tiny, teacher, name):
    recipe = RECIPES[name]
    batch = batch_of(tiny, mixture(tiny))
    all_targets = targets_of(teacher, batch)
    fields = {
        "attention": {"attention": all_targets.attention},
        "vision": {"vision_BVD": all_targets.vision_BVD},
        "logits": {"answers": all_targets.answers},
        "advantage": {"advantage_A": all_targets.advantage_A},
    }
    chosen = {k: v for need in recipe.needs for k, v in fields[need].items()}
    objective = Objective(
        tiny, recipe, shape_of(teacher) if recipe.needs & {"attention", "vision"} else None, logit_codec=ExactTopK()
    )
    terms = flat(objective(batch, Targets(**chosen)))
    assert terms["loss"].isfinite()
    assert {t for t in TERMS if t in terms} == {t for t, weight in term_weights(recipe).items() if weight > 0}


def test_what_each_weight_needs():
    assert Recipe().needs == set()
    assert Recipe(reverse_kl=1).needs == {"logits"}
    assert Recipe(attention=1).needs == {"attention"}
    assert Recipe(vision=1, vision_focus=0).needs == {"vision"}
    assert Recipe(vision=1, vision_focus=0.1).needs == {"vision", "attention"}
    assert Recipe(vision=0, vision_focus=0.1).needs == set()


def test_batches_of_a_step_add_up_to_one_large_batch(tiny, teacher):
    """Terms, loss and gradients, whatever samples lie together: counts are of the whole step."""
    recipe = RECIPES["align-kd"]
    torch.manual_seed(0)
    whole, expected = run(tiny, teacher, recipe)
    gradients = {name: p.grad.clone() for name, p in whole.named_parameters() if p.grad is not None}
    whole.zero_grad()
    counts = batch_of(tiny, mixture(tiny)).counts()
    parts = [mixture(tiny)[:1], mixture(tiny)[1:3], mixture(tiny)[3:]]
    sums = dict.fromkeys(expected, 0.0)
    for samples in parts:
        batch = batch_of(tiny, samples)
        terms = flat(whole(batch, targets_of(teacher, batch), counts))
        terms["loss"].backward()
        sums = {name: total + float(terms[name].detach()) for name, total in sums.items()}
    assert sums == pytest.approx({name: float(value.detach()) for name, value in expected.items()}, rel=1e-4)
    for name, p in whole.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_an_objective_that_touches_all_gives_every_trained_parameter_a_gradient(tiny, teacher):
    samples = [sample(tiny, [1, 5, 6, 7, 8])]
    objective = Objective(
        tiny, RECIPES["align-kd"], shape_of(teacher), logit_codec=ExactTopK(), keep_all_parameters_in_graph=True
    ).train()
    batch = batch_of(tiny, samples)
    objective(batch, targets_of(teacher, batch))["loss"].backward()
    assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)
    assert not names(objective, PROJECTOR) & moved(objective)


@pytest.mark.parametrize("part", ["attention", "vision", "answers"])
def test_a_sample_whose_term_is_not_finite_is_pointed_at(tiny, teacher, part):
    objective = Objective(tiny, RECIPES["align-kd"], shape_of(teacher), logit_codec=ExactTopK())
    batch = batch_of(tiny, mixture(tiny))
    targets = targets_of(teacher, batch)
    if part == "attention":
        targets.attention[0][1, 0, 0, 0] = torch.nan
    elif part == "vision":
        targets.vision_BVD[1, 0, 0] = torch.inf
    else:
        targets.answers["logprobs"][int((batch.answer_samples_A == 1).nonzero()[0]), 0] = torch.nan
    assert objective(batch, targets)["bad_B"].tolist() == [i == 1 for i in range(batch.samples)]


def test_padding_and_neighbours_change_no_alignment_term(tiny, teacher):
    objective = Objective(tiny, RECIPES["align-kd"], shape_of(teacher), logit_codec=ExactTopK())
    samples = [s for s in mixture(tiny) if len(s.images)]

    def terms_of(chosen):
        batch = batch_of(tiny, chosen)
        with torch.no_grad():
            return flat(objective(batch, targets_of(teacher, batch)))

    together, alone = terms_of(samples), [terms_of([s]) for s in samples]
    with_text = terms_of([*samples, sample(tiny, [1, 5, 6, 7, 8, 9], answers=2)])
    for name in ("attention", "vision_all", "vision_focus"):
        torch.testing.assert_close(together[name], torch.stack([t[name] for t in alone]).mean(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(with_text[name], together[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda r: r.name)
def test_a_batch_without_any_image_trains_on_its_answers_alone(tiny, teacher, recipe):
    samples = [sample(tiny, [1, 5, 6, 7, 8]), sample(tiny, [1, 9, 10, 11, 12, 13])]
    objective, terms = run(tiny, teacher, recipe, samples)
    assert terms["loss"].isfinite()
    assert all(terms[name] == 0 for name in ("attention", "vision_all", "vision_focus") if name in terms)
    assert all(p.grad.isfinite().all() for p in objective.parameters() if p.grad is not None)
    assert moved(objective) >= Q_AND_K
    assert not any(name.startswith(("head_map", "width_map")) for name in moved(objective))


def test_a_batch_without_any_answer_trains_on_its_alignment_alone(tiny, teacher):
    objective, terms = run(tiny, teacher, RECIPES["align-kd"], [sample(tiny, [1, -200, 6, 7, 8], answers=0)])
    assert terms["supervised"] == terms["reverse_kl"] == 0
    assert terms["loss"] > 0
    assert all(p.grad.isfinite().all() for p in objective.parameters() if p.grad is not None)


def test_a_few_steps_bring_every_term_of_the_teacher_down(tiny, teacher):
    # The supervised term is left out: a random teacher does not agree with the answers.
    torch.manual_seed(0)
    objective = Objective(
        tiny, replace(RECIPES["align-kd"], supervised=0.0, focus_k=2), shape_of(teacher), logit_codec=ExactTopK()
    )
    objective.train()
    batch = batch_of(tiny, mixture(tiny))
    targets = targets_of(teacher, batch, k=tiny.vocabulary)
    optimizer = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad], lr=1e-2)
    history = []
    for _ in range(15):
        optimizer.zero_grad()
        terms = flat(objective(batch, targets))
        terms["loss"].backward()
        optimizer.step()
        history.append({name: float(value.detach()) for name, value in terms.items()})
    assert all(history[-1][name] < 0.9 * history[0][name] for name in history[0].keys() - {"supervised"})


def test_a_head_mean_in_the_cache_asks_for_the_mean_map(tiny, teacher):
    with pytest.raises(ValueError, match="head_map=mean"):
        Objective(tiny, RECIPES["align-kd"], TeacherShape(1, teacher.hidden_size), logit_codec=ExactTopK())
    recipe = Recipe("one", attention=1, head_map="mean")
    batch = batch_of(tiny, mixture(tiny))
    full = targets_of(teacher, batch)
    mean = Targets({0: full.attention[0].mean(1, keepdim=True)})
    by_mean = flat(Objective(tiny, recipe, TeacherShape(1, teacher.hidden_size))(batch, mean))
    by_heads = flat(Objective(tiny, recipe, shape_of(teacher))(batch, full))
    torch.testing.assert_close(by_mean["attention"], by_heads["attention"])
