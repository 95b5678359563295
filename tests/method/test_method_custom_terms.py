"""Loss terms from outside the package: registration, recipes, and what the objective makes of them."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from exact_logits import ExactTopK, shape_of, targets_of
from tiny_models import batch_of, flat, mixture, write_checkpoint
from torch import nn

from alignkd.capture.attention import capture
from alignkd.errors import ConfigError
from alignkd.inputs.batch import Counts
from alignkd.losses import term_registry
from alignkd.losses.custom_terms import RESERVED, register_term
from alignkd.losses.recipes import RECIPES, Recipe, get_recipe, one_term_recipes, recipe_record, term_weights
from alignkd.models.loading import load_vlm
from alignkd.objective import Objective
from alignkd.targets.batch_targets import Targets


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(term_registry, "_TERMS", {})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "model"
    write_checkpoint(folder, seed=1, hidden_size=32, num_attention_heads=8, num_key_value_heads=8, num_hidden_layers=3)
    return load_vlm(folder)


def objective_of(tiny, teacher, recipe, **settings):
    torch.manual_seed(0)
    return Objective(tiny, recipe, shape_of(teacher), logit_codec=ExactTopK(), **settings).train()


def register_vision_norm(**settings):
    """A function: the mean square of a sample's vision tokens, from the student alone."""

    @register_term("vision_norm", **settings)
    def vision_norm(inputs):
        return inputs.student_vision_BVD.float().square().mean(dim=(1, 2))

    return vision_norm


def register_lifted():
    """A module with parameters of its own: the error of vision tokens mapped to the teacher's width."""

    @register_term("lifted", needs=("vision",))
    class Lifted(nn.Module):
        def __init__(self, shapes):
            super().__init__()
            self.map = nn.Linear(shapes.student_width, shapes.teacher.width)

        def forward(self, inputs):
            error = self.map(inputs.student_vision_BVD) - inputs.targets.vision_BVD
            return error.square().mean(dim=(1, 2))

    return Lifted


# --- registration and recipes ------------------------------------------------------------------------------------------


def test_registry_and_recipes_import_no_torch():
    code = "import sys, alignkd.losses.custom_terms, alignkd.losses.recipes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_second_registration_of_a_name_is_refused_with_both():
    register_vision_norm()
    with pytest.raises(ConfigError, match=r"'vision_norm' is registered already, by .*register_vision_norm.*vision_norm; .*"):
        register_vision_norm()


@pytest.mark.parametrize("name", ["vision", "vision_all", "focus_k", "extra", "base", "loss", "step", "weighting"])
def test_names_of_recipes_terms_and_log_lines_are_refused(name):
    with pytest.raises(ConfigError, match="already; choose another"):
        register_term(name)


def test_every_key_of_a_log_line_is_reserved(tmp_path):
    from alignkd.pipeline.training.monitoring.metrics import Metrics

    metrics = Metrics(tmp_path / "metrics.jsonl", term_weights(Recipe()), writes=True)
    metrics.add({"loss": torch.ones(()), "attention_contrast": torch.ones(())}, samples=1, tokens=1, answers=1)
    line = metrics.line({"loss": 1.0, "learning_rate": 0.1, "grad_norm": 1.0}, step=1, epoch=1.0)
    assert {key for key in line if "/" not in key} <= RESERVED


@pytest.mark.parametrize("name", ["", "Mine", "a.b", "a-b", "_a", "a b", "é"])
def test_a_name_that_cannot_be_a_key_is_refused(name):
    with pytest.raises(ConfigError, match="expected a name of lower-case letters"):
        register_term(name)


def test_unknown_targets_and_averages_are_refused():
    with pytest.raises(ConfigError, match="needs visoin; known targets are attention, vision, logits"):
        register_term("mine", needs=("visoin",))
    with pytest.raises(ConfigError, match="averaged_over is 'tokens', expected with_image, with_text_after_image, samples"):
        register_term("mine", averaged_over="tokens")


def test_recipes_take_the_weights_of_registered_terms(tmp_path):
    register_vision_norm()
    register_lifted()
    file = tmp_path / "mine.yaml"
    file.write_text("base: sft\nvision_norm: 1e-2\n")
    recipe = get_recipe(str(file), {"lifted": "0.5"})
    assert recipe.extra == {"lifted": 0.5, "vision_norm": 0.01}
    assert list(recipe.extra) == ["lifted", "vision_norm"]
    assert recipe.needs == {"vision"}
    assert get_recipe(str(file), {"lifted": "0"}).needs == set()
    assert term_weights(recipe)["lifted"] == 0.5
    assert hash(recipe) == hash(replace(recipe))
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    file.write_text(yaml.safe_dump(recipe_record(recipe)))
    assert get_recipe(str(file)) == recipe


@pytest.mark.parametrize(("value", "message"), [("-1", "expected a weight of 0 or more"), ("much", "expected float")])
def test_weights_out_of_range_are_refused(value, message):
    register_vision_norm()
    with pytest.raises(ConfigError, match=message):
        get_recipe("sft", {"vision_norm": value})


def test_an_unknown_name_is_refused_with_fields_and_registered_terms():
    register_vision_norm()
    with pytest.raises(
        ConfigError, match=r"'vision_nrom' is no field of a recipe; known are .*focus_k.* registered terms: vision_norm"
    ):
        get_recipe("sft", {"vision_nrom": "1"})
    with pytest.raises(ConfigError, match=r"extra: loss term 'other' is not registered \(registered: vision_norm\)"):
        Recipe(extra={"other": 1.0})


def test_the_record_of_a_recipe_without_extra_terms_is_that_of_older_runs():
    for recipe in RECIPES.values():
        assert "extra" not in recipe_record(recipe)
    register_vision_norm()
    assert recipe_record(Recipe(extra={"vision_norm": 0.0}))["extra"] == {"vision_norm": 0.0}


# --- the objective -----------------------------------------------------------------------------------------------------


def test_a_function_term_is_weighted_reported_and_reaches_the_student(tiny, teacher):
    register_vision_norm()
    batch = batch_of(tiny, mixture(tiny))
    targets = targets_of(teacher, batch)
    plain = get_recipe("align-kd")
    before = flat(objective_of(tiny, teacher, plain)(batch, targets))
    objective = objective_of(tiny, teacher, replace(plain, extra={"vision_norm": 0.5}))
    outcome = objective(batch, targets)
    value_B = capture(tiny, batch).vision_BVD.square().mean(dim=(1, 2))
    expected = (value_B * batch.samples_with_image()).sum() / 5
    torch.testing.assert_close(outcome["terms"]["vision_norm"], expected.detach())
    torch.testing.assert_close(outcome["loss"], before["loss"] + 0.5 * expected)
    assert not outcome["terms"]["vision_norm"].requires_grad
    assert not outcome["bad_B"].any()
    only = objective(batch, targets, recipe=one_term_recipes(objective.recipe)["vision_norm"])
    torch.testing.assert_close(only["loss"], 0.5 * expected)
    assert set(only["terms"]) == {"supervised", "vision_norm"}
    tiny.model.zero_grad()
    only["loss"].backward()
    moved = {name for name, p in tiny.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved
    assert all("multi_modal_projector" in name for name in moved)


def test_a_module_term_trains_and_is_saved(tiny, teacher):
    register_lifted()
    batch = batch_of(tiny, mixture(tiny))
    targets = targets_of(teacher, batch)
    objective = objective_of(tiny, teacher, Recipe(extra={"lifted": 1.0}))
    names = {"extra_terms.term_lifted.map.weight", "extra_terms.term_lifted.map.bias"}
    assert {name for name, _ in objective.named_parameters() if "lifted" in name} == names
    assert names <= objective.state_dict().keys()
    optimizer = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        outcome = objective(batch, targets)
        outcome["loss"].backward()
        optimizer.step()
        losses.append(float(outcome["terms"]["lifted"]))
    assert losses[-1] < losses[0]
    other = objective_of(tiny, teacher, objective.recipe)
    other.load_state_dict(objective.state_dict())
    torch.testing.assert_close(other(batch, targets)["terms"], objective(batch, targets)["terms"], rtol=0, atol=0)


def test_a_recipe_without_extra_terms_has_the_same_parameters_and_state(tiny, teacher):
    register_lifted()
    plain = objective_of(tiny, teacher, get_recipe("align-kd"))
    zero = objective_of(tiny, teacher, get_recipe("align-kd", {"lifted": "0"}))
    assert not any("extra" in name for name in plain.state_dict())
    assert plain.state_dict().keys() == zero.state_dict().keys()
    batch = batch_of(tiny, mixture(tiny))
    targets = targets_of(teacher, batch)
    for one, same in zip(flat(plain(batch, targets)).items(), flat(zero(batch, targets)).items(), strict=True):
        assert one[0] == same[0]
        assert torch.equal(one[1], same[1])


def test_a_term_that_compares_attention_gets_the_matching_layers(tiny, teacher):
    seen = {}

    @register_term("heads", needs=("attention",), averaged_over="with_text_after_image")
    def heads(inputs):
        seen.update(pairs=inputs.layer_pairs, student=set(inputs.student_attention))
        student, theirs = inputs.layer_pairs[-1]
        ours = inputs.student_attention[student].sum(dim=3).mean(dim=(1, 2))
        return (ours - inputs.targets.attention[theirs].sum(dim=3).mean(dim=(1, 2))).square()

    recipe = Recipe(extra={"heads": 1.0}, attention_layers="all")
    assert recipe.needs == {"attention"}
    objective = objective_of(tiny, teacher, recipe)
    batch = batch_of(tiny, mixture(tiny))
    outcome = objective(batch, targets_of(teacher, batch))
    assert seen == {"pairs": ((0, 0), (1, 2)), "student": {0, 1}}
    assert outcome["attention_BHTV"].shape[1] == teacher.heads
    assert outcome["terms"]["heads"].isfinite()
    with pytest.raises(ConfigError, match="give the teacher's TeacherShape"):
        Objective(tiny, recipe, None)
    with pytest.raises(ConfigError, match="needs targets that this batch does not have: attention"):
        objective(batch, Targets())


@pytest.mark.parametrize("over", ["samples", "with_image", "with_text_after_image"])
def test_a_step_in_parts_averages_over_the_samples_of_all_its_batches(tiny, teacher, over):
    @register_term("ones", averaged_over=over)
    def ones(inputs):
        return torch.arange(1.0, inputs.batch.samples + 1) + 0 * inputs.student_vision_BVD.sum()

    objective = objective_of(tiny, teacher, Recipe(extra={"ones": 2.0}))
    samples = mixture(tiny)
    parts = [batch_of(tiny, samples[:2]), batch_of(tiny, samples[2:])]
    names = ("answers", "with_text_after_image", "with_image", "samples")
    step = Counts(**{name: sum(getattr(part.counts(), name) for part in parts) for name in names})
    assert step.samples == len(samples)
    found = sum(objective(part, targets_of(teacher, part), step)["terms"]["ones"] for part in parts)
    with_image = [1, 2, 2, 3, 4]  # of each part counted from 1; the third sample of all has no image
    expected = {"samples": sum([1, 2, 1, 2, 3, 4]) / 6}.get(over, sum(with_image) / 5)
    assert float(found) == pytest.approx(expected)


def test_not_finite_values_are_marked_and_samples_that_do_not_count_are_dropped(tiny, teacher):
    @register_term("fragile", averaged_over="with_image")
    def fragile(inputs):
        value_B = inputs.student_vision_BVD.float().mean(dim=(1, 2))
        value_B = value_B.masked_fill(~inputs.batch.samples_with_image(), 1e9)
        bad = torch.zeros_like(value_B)
        bad[4] = torch.nan
        return value_B + bad

    objective = objective_of(tiny, teacher, Recipe(extra={"fragile": 1.0}))
    batch = batch_of(tiny, mixture(tiny))
    assert objective(batch, targets_of(teacher, batch))["bad_B"].tolist() == [False] * 4 + [True, False]
    less = batch_of(tiny, mixture(tiny)[:4] + mixture(tiny)[:2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "nan", 0.0)
        assert objective(less, targets_of(teacher, less))["terms"]["fragile"].abs() < 1e6


@pytest.mark.parametrize("give", [lambda inputs: 1.0, lambda inputs: torch.ones(()), lambda inputs: torch.ones(6, dtype=int)])
def test_anything_but_one_number_per_sample_is_refused(tiny, teacher, give):
    register_term("odd")(give)
    batch = batch_of(tiny, mixture(tiny))
    with pytest.raises(ConfigError, match=r"loss term 'odd' returned .*, expected .* per sample"):
        objective_of(tiny, teacher, Recipe(extra={"odd": 1.0}))(batch, Targets())


def test_a_class_that_is_no_module_is_refused(tiny, teacher):
    register_term("odd")(type("Odd", (), {}))
    with pytest.raises(ConfigError, match=r"is the class Odd, expected a torch\.nn\.Module"):
        objective_of(tiny, teacher, Recipe(extra={"odd": 1.0}))


def test_parameters_get_a_gradient_from_every_batch_where_processes_average_them(tiny, teacher):
    @register_term("lazy")
    class Lazy(nn.Module):
        def __init__(self, shapes):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(shapes.student_heads))

        def forward(self, inputs):
            return torch.zeros(inputs.batch.samples)

    objective = objective_of(tiny, teacher, Recipe(extra={"lazy": 1.0}), keep_all_parameters_in_graph=True)
    objective(batch_of(tiny, mixture(tiny)), Targets())["loss"].backward()
    assert torch.equal(objective.extra_terms.term_lazy.scale.grad, torch.zeros(tiny.heads))


def test_a_learned_weighting_has_a_precision_for_each_extra_term(tiny, teacher):
    register_vision_norm()
    register_lifted()
    recipe = get_recipe("beta-kd", {"vision_norm": "0.5", "lifted": "0"})
    objective = objective_of(tiny, teacher, recipe)
    assert objective.learned_weights.groups == ("supervised", "reverse_kl", "attention", "vision", "vision_norm")
    batch = batch_of(tiny, mixture(tiny))
    outcome = objective(batch, targets_of(teacher, batch))
    assert outcome["precisions"]["vision_norm"] == 1
    (gradient,) = torch.autograd.grad(outcome["loss"], objective.learned_weights.log_variances)
    torch.testing.assert_close(gradient[-1], 1 - 0.5 * outcome["terms"]["vision_norm"])
