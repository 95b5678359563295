"""The slice of a teacher gives what a whole forward pass of it captures, for any batch, and belongs to no checkpoint."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from exact_logits import ExactTopK, exact_answers
from test_method_golden import CASES, VALUES, prepared
from tiny_models import IMAGE, batch_of, flat, mixture, sample, write_checkpoint
from transformers.models.llama.modeling_llama import LlamaAttention

from alignkd.capture.attention import capture
from alignkd.capture.teacher_slice import GROUPS, TeacherSlice, check_sliceable, slice_config, slice_tensors
from alignkd.losses.recipes import get_recipe
from alignkd.models.loading import load_vlm
from alignkd.objective import Objective, TeacherShape
from alignkd.targets.batch_targets import Targets


def slice_of(vlm, *, tower=True, **options):
    return TeacherSlice(slice_config(vlm.model), slice_tensors(vlm, tower=tower), **options)


def captured_targets(vlm, batch):
    with torch.no_grad():
        captured = capture(vlm, batch)
    return captured.attention[0], captured.vision_BVD


def golden_batch(vlm):
    """Every golden sample in both templates, one without an image, one with two."""
    two = replace(prepared(vlm, *CASES[0]), input_ids=sample(vlm, [1, 9, IMAGE, 8, IMAGE, 7, 6, 5]).input_ids)
    two = replace(two, labels=two.input_ids, images=torch.cat([two.images, prepared(vlm, *CASES[-1]).images]))
    return batch_of(vlm, [*(prepared(vlm, *case) for case in CASES), sample(vlm, [1, 40, 41, 42, 43]), two])


def assert_same(found, expected, attention=1e-5, vision=1e-5):
    for values, wanted, bound in zip(found, expected, (attention, vision), strict=True):
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, wanted.float(), rtol=0, atol=bound)


@pytest.mark.parametrize("tower", [True, False])
def test_a_slice_gives_what_the_whole_golden_teacher_captures(golden_models, tower):
    vlm = golden_models["teacher"]
    batch = golden_batch(vlm)
    expected = captured_targets(vlm, batch)
    part = slice_of(vlm, tower=tower)
    assert part.shares_tower == (not tower)
    if not tower:
        with torch.no_grad():
            batch = replace(batch, images=vlm.model.model.run_tower(batch.images))
    assert_same(part.targets(batch), expected)


def test_a_slice_gives_the_values_of_the_reference_code(golden_models):
    vlm = golden_models["teacher"]
    part = slice_of(vlm)
    for template, name in CASES:
        attention, vision = part.targets(batch_of(vlm, [prepared(vlm, template, name)]))
        golden = {
            k: torch.from_numpy(VALUES[f"{template}/{name}/teacher/{k}"]) for k in ("attention_text_to_vision", "vision_tokens")
        }
        torch.testing.assert_close(attention[0], golden["attention_text_to_vision"], rtol=0, atol=1e-5)
        torch.testing.assert_close(vision[0], golden["vision_tokens"], rtol=0, atol=1e-4 * float(vision.abs().max()))


ROPES = {
    "default": None,
    "linear": {"type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 2},
        {"num_key_value_heads": 1, "rms_norm_eps": 1e-2, "rope_theta": 100.0},
        {"tie_word_embeddings": True},
        {"rope_scaling": ROPES["linear"]},
        {"rope_scaling": ROPES["llama3"], "mm_vision_select_layer": -1},
    ],
    ids=["grouped heads", "one key head", "tied", "linear rotary positions", "llama3 rotary positions"],
)
def test_a_slice_of_any_llama_gives_what_the_whole_captures(tmp_path, changes):
    write_checkpoint(tmp_path / "model", **changes)
    vlm = load_vlm(tmp_path / "model")
    batch = batch_of(vlm, mixture(vlm))
    assert_same(slice_of(vlm).targets(batch), captured_targets(vlm, batch))


def test_biases_of_the_projections_are_part_of_the_slice(tiny):
    attention = tiny.model.model.language_model.layers[0].self_attn
    tiny.model.config.text_config.attention_bias = True
    for name in ("q_proj", "k_proj"):
        linear = getattr(attention, name)
        linear.bias = torch.nn.Parameter(torch.randn(linear.out_features))
    batch = batch_of(tiny, mixture(tiny))
    assert_same(slice_of(tiny).targets(batch), captured_targets(tiny, batch))


@pytest.mark.parametrize("texts", [[[1, 5, 6, 7]], [[1, 5, IMAGE]], [[1, 5, IMAGE], [1, 2, 3, 4]]])
def test_batches_without_images_or_without_text_after_them(tiny, texts):
    batch = batch_of(tiny, [sample(tiny, text, answers=1) for text in texts])
    attention, vision = slice_of(tiny).targets(batch)
    expected = captured_targets(tiny, batch)
    assert attention.shape == expected[0].shape
    assert attention.numel() == 0
    assert_same((attention, vision), expected)


def test_neighbours_and_padding_change_nothing(tiny):
    samples, part = mixture(tiny), slice_of(tiny)
    together = part.targets(batch_of(tiny, samples))
    for i, one in enumerate(samples):
        attention, vision = part.targets(batch_of(tiny, [one]))
        rows, columns = attention.shape[2:]
        assert_same((together[0][i, :, :rows, :columns], together[1][i, :columns]), (attention[0], vision[0]))
        assert together[0][i, :, rows:].abs().sum() == together[0][i, :, :, columns:].abs().sum() == 0
        assert together[1][i, columns:].abs().sum() == 0


def test_a_head_mean_is_the_mean_of_the_heads(tiny):
    batch = batch_of(tiny, mixture(tiny))
    heads, _ = slice_of(tiny).targets(batch)
    mean, _ = slice_of(tiny, head_mean=True).targets(batch)
    assert mean.shape[1] == 1
    torch.testing.assert_close(mean, heads.mean(dim=1, keepdim=True), rtol=0, atol=1e-6)


def test_vision_tokens_alone_cost_no_attention(tiny):
    batch = batch_of(tiny, mixture(tiny))
    attention, vision = slice_of(tiny).targets(batch, attention=False)
    assert attention is None
    torch.testing.assert_close(vision, captured_targets(tiny, batch)[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_slice_computes_in_the_dtype_of_its_teacher_whatever_the_student_computes_in(tiny_folder, dtype):
    vlm = load_vlm(tiny_folder, dtype=dtype)
    tensors = slice_tensors(vlm, tower=True)
    assert {flat.dtype for flat in tensors.values()} == {dtype}
    part = TeacherSlice(slice_config(vlm.model), tensors)
    batch = batch_of(vlm, mixture(vlm))
    plain = part.targets(batch)
    assert_same(plain, captured_targets(vlm, batch), attention=5e-3, vision=5e-2)
    with torch.autocast("cpu", torch.bfloat16 if dtype == torch.float16 else torch.float16):
        under = part.targets(batch)
    assert torch.equal(under[0], plain[0])
    assert torch.equal(under[1], plain[1])


def test_stored_tensors_are_used_in_place(tiny):
    tensors = slice_tensors(tiny, tower=True)
    part = TeacherSlice(slice_config(tiny.model), tensors)
    held = {parameter.untyped_storage().data_ptr() for parameter in part.model.parameters()}
    assert held == {flat.untyped_storage().data_ptr() for flat in tensors.values()}
    assert sum(p.numel() for p in part.model.parameters()) == sum(flat.numel() for flat in tensors.values())


def test_making_a_slice_draws_no_random_numbers_of_the_run(tiny):
    config, tensors = slice_config(tiny.model), slice_tensors(tiny, tower=True)
    before = torch.get_rng_state()
    TeacherSlice(config, tensors)
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_waits_for_the_device(tiny):
    # On the meta device there is nothing to wait for: whatever asked for a value would raise.
    batch = batch_of(tiny, mixture(tiny))
    attention, vision = slice_of(tiny, device="meta").targets(batch.to("meta"))
    expected = captured_targets(tiny, batch)
    assert (attention.shape, vision.shape) == (expected[0].shape, expected[1].shape)


# --- in the objective --------------------------------------------------------------------------------------------------


def loss_and_gradients(student, teacher, recipe, batch, targets, part):
    torch.manual_seed(0)
    heads = 1 if part is not None and part.head_mean else teacher.heads
    if targets.attention:
        heads = targets.attention[0].shape[1]
    objective = Objective(student, recipe, TeacherShape(heads, teacher.hidden_size), part, ExactTopK()).train()
    objective.zero_grad()
    outputs = flat(objective(batch, targets))
    outputs["loss"].backward()
    return outputs, {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tower", [True, False])
@pytest.mark.parametrize(
    ("recipe", "overrides", "head_mean"),
    [
        ("align-kd", {}, False),
        ("paper", {}, False),
        ("align-kd", {"head_map": "mean"}, True),
        ("align-kd", {"attention": "0"}, False),
    ],
    ids=["align-kd", "paper", "head mean", "vision alone"],
)
def test_losses_and_gradients_are_those_of_captured_targets(golden_models, recipe, overrides, head_mean, tower):
    teacher, student = golden_models["teacher"], load_vlm(golden_models["student"].folder)
    batch, recipe = golden_batch(student), get_recipe(recipe, overrides)
    with torch.no_grad():
        captured = capture(teacher, batch)
        answers = exact_answers(teacher, captured.hidden_AD, 64)
    attention = captured.attention[0].mean(1, keepdim=True) if head_mean else captured.attention[0]
    given = Targets({0: attention}, captured.vision_BVD, answers)
    left_out = replace(given, attention={}, vision_BVD=None)
    expected, expected_gradients = loss_and_gradients(student, teacher, recipe, batch, given, None)
    part = slice_of(teacher, tower=tower, head_mean=head_mean)
    terms, gradients = loss_and_gradients(student, teacher, recipe, batch, left_out, part)
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("tower", [True, False])
def test_a_tower_that_is_one_runs_once_for_both(tiny, monkeypatch, tower):
    part = slice_of(tiny, tower=tower)
    objective = Objective(tiny, get_recipe("align-kd", {"reverse_kl": "0"}), TeacherShape(tiny.heads, tiny.hidden_size), part)
    runs = []
    for vision_tower in {id(t): t for t in (tiny.tower, part.model.vision_tower) if t is not None}.values():
        vision_tower.register_forward_hook(lambda module, *_: runs.append(module))
    objective(batch_of(tiny, mixture(tiny)), Targets())
    assert len(runs) == (2 if tower else 1)


def test_a_slice_is_no_part_of_a_checkpoint_and_never_learns(tiny):
    part = slice_of(tiny)
    before = {name: tensor.clone() for name, tensor in part.model.state_dict().items()}
    recipe, shape = get_recipe("align-kd", {"reverse_kl": "0"}), TeacherShape(tiny.heads, tiny.hidden_size)
    torch.manual_seed(0)
    objective = Objective(tiny, recipe, shape, part).train()
    assert objective.state_dict().keys() == Objective(tiny, recipe, shape).state_dict().keys()
    objective(batch_of(tiny, mixture(tiny)), Targets())["loss"].backward()
    torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.1).step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in part.model.state_dict().items())
    assert not any(p.requires_grad for p in part.model.parameters())
    assert not part.model.training


# --- refusals ----------------------------------------------------------------------------------------------------------


class OtherAttention(LlamaAttention):
    """Of another family: it may compute something else."""


def other_attention(model):
    layer = model.model.language_model.layers[0]
    layer.self_attn = OtherAttention(model.config.text_config, 0)


def other_projection(model):
    attention = model.model.language_model.layers[0].self_attn
    attention.k_proj = torch.nn.Sequential(attention.k_proj)


REFUSED = {
    "another attention": (other_attention, "a OtherAttention where LlamaAttention is expected"),
    "an adapter": (other_projection, "a Sequential where Linear is expected"),
    "another norm": (
        lambda m: setattr(m.model.language_model.layers[0], "input_layernorm", torch.nn.LayerNorm(24)),
        "a LayerNorm where LlamaRMSNorm is expected",
    ),
    "a sliding window": (lambda m: setattr(m.config.text_config, "sliding_window", 8), "sliding_window = 8"),
    "soft-capped scores": (
        lambda m: setattr(m.config.text_config, "attn_logit_softcapping", 50.0),
        "attn_logit_softcapping = 50.0",
    ),
    "rotary positions of the batch": (
        lambda m: m.config.text_config.rope_parameters.update(rope_type="dynamic"),
        "depend on the longest prompt",
    ),
}


@pytest.mark.parametrize("change", REFUSED)
def test_a_teacher_whose_first_scores_need_more_is_refused_by_name(tiny, change):
    check_sliceable(tiny)
    spoil, words = REFUSED[change]
    spoil(tiny.model)
    with pytest.raises(ValueError, match=f"cannot be recomputed from a slice: .*{words}.*--alignment targets"):
        slice_tensors(tiny, tower=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_teacher_with_numbers_that_are_not_finite_is_refused_by_name(tiny, value):
    with torch.no_grad():
        tiny.model.model.multi_modal_projector.mlp.mlp[0].bias[3] = value
    with pytest.raises(ValueError, match=r"multi_modal_projector\.mlp\.mlp\.0\.bias holds NaN or infinite"):
        slice_tensors(tiny, tower=True)


def test_a_teacher_of_mixed_dtypes_is_refused(tiny):
    tiny.model.model.multi_modal_projector.half()
    tiny.model.model.multi_modal_projector.mlp.mlp[0].float()
    with pytest.raises(ValueError, match=r"projector holds torch\.float16, torch\.float32: expected one"):
        slice_tensors(tiny, tower=True)


@pytest.mark.parametrize("group", GROUPS)
def test_tensors_that_are_not_those_of_the_configuration_are_refused(tiny, group):
    tensors = slice_tensors(tiny, tower=True)
    for wrong in (tensors[group][:-1], tensors[group].view(1, -1), tensors[group].int()):
        with pytest.raises(ValueError, match=f"the slice's {group} holds"):
            TeacherSlice(slice_config(tiny.model), tensors | {group: wrong})


HOSTILE = [
    ("text", "hidden_size", 2**40),
    ("text", "hidden_size", "64"),
    ("text", "num_attention_heads", 0),
    ("text", "rope_parameters", {"rope_type": "none such", "rope_theta": 1e4}),
    ("text", "vocab_size", 2**20),
    ("vision", "num_hidden_layers", 10**6),
    ("vision", "image_size", 2**20),
    ("vision", "hidden_act", "none such"),
    ("vision", "hidden_size", None),
    ("features", "projector_grid", []),
]


@pytest.mark.parametrize(("part", "name", "value"), HOSTILE, ids=[f"{part} {name} {value}" for part, name, value in HOSTILE])
def test_a_hostile_configuration_is_refused_before_anything_is_allocated(tiny, part, name, value):
    tensors, config = slice_tensors(tiny, tower=True), slice_config(tiny.model)
    config[part] = {**config[part], name: value}
    with pytest.raises(ValueError, match="slice"):
        TeacherSlice(config, tensors)


def test_a_configuration_that_lacks_something_or_names_something_else(tiny):
    tensors, config = slice_tensors(tiny, tower=True), slice_config(tiny.model)
    with pytest.raises(ValueError, match=r"not the configuration of a teacher's slice \(KeyError: 'vision'"):
        TeacherSlice({k: v for k, v in config.items() if k != "vision"}, tensors)
    # What is not of the config is not heard: such names load code in transformers' configurations.
    config["text"]["attn_implementation"] = "someone/kernel"
    assert TeacherSlice(config, tensors).model.config.text_config._attn_implementation != "someone/kernel"
