"""What is captured of a model is its own, also of models whose logits, masks or attention are unusual; else it is refused.

Shapes: B samples, A answers, N vocabulary, H heads, T text rows, V vision columns.
"""

from __future__ import annotations

import make_gemma3
import make_hyperclovax
import make_internvl
import make_minimax_m3
import numpy as np
import pytest
import torch
from conversations import Conversation
from family_conformance import batch_of, prepared
from plain_transformers import plain_model
from transformers import (
    CohereConfig,
    GptOssConfig,
    GraniteConfig,
    Llama4TextConfig,
    MiMoV2FlashConfig,
    MistralConfig,
)

from alignkd.capture import kernel
from alignkd.capture.attention import capture, enable_capture
from alignkd.capture.check_prompt import length_beyond_reach, noise_prompt
from alignkd.errors import CheckpointError
from alignkd.losses.recipes import get_recipe
from alignkd.models.loading import load_vlm
from alignkd.objective import Objective
from alignkd.pipeline.data.preparer import Prepared
from alignkd.pipeline.evaluate.show_sample import captured_arrays
from alignkd.pipeline.stage_one.calibrate import calibrate
from alignkd.targets.batch_targets import DecodedTargets

WORDS = "a dog and the mat, red or green, which is red? " * 6
LONG = Conversation("long", (("human", f"<image>\nWhat is it? {WORDS}"), ("gpt", "It is blue. A dog.")), ((60, 40),))
SINKS = {
    "head_dim": 8,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
FLASH = {"v_head_dim": 8, "swa_head_dim": 8, "swa_v_head_dim": 8, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}
BUILDS = {
    "scaled": make_hyperclovax.write,
    "sparse": make_minimax_m3.write,
    "sinks": lambda folder: make_internvl.write(folder, 0, GptOssConfig, **SINKS),
    "sinks of another": lambda folder: make_internvl.write(
        folder, 0, MiMoV2FlashConfig, head_dim=8, sliding_window=16, n_routed_experts=2, num_experts_per_tok=1, **FLASH
    ),
    "granite": lambda folder: make_internvl.write(folder, 0, GraniteConfig, logits_scaling=8.0, attention_multiplier=0.3),
    "cohere": lambda folder: make_internvl.write(folder, 0, CohereConfig, logit_scale=0.0625),
    "window": lambda folder: make_internvl.write(folder, 0, MistralConfig, sliding_window=16, head_dim=8),
    "chunks": lambda folder: make_internvl.write(
        folder, 0, Llama4TextConfig, head_dim=8, attention_chunk_size=16, intermediate_size_mlp=48, **EXPERTS
    ),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of a build, written once."""
    done = {}

    def build(name):
        if name not in done:
            BUILDS[name](done.setdefault(name, tmp_path_factory.mktemp("built") / "model"))
        return done[name]

    return build


def own(folder, vlm, batch):
    """Logits of answers ``[A, N]``, and attention of each layer ``[H, T, V]``, of transformers alone."""
    given = {**batch.image_inputs, **batch.token_inputs}
    output = plain_model(folder, "eager")(
        input_ids=batch.input_ids_BS,
        attention_mask=batch.attention_mask_BS.long(),
        pixel_values=batch.images,
        use_cache=False,
        output_attentions=True,
        **given,
    )
    rows, columns = batch.text_rows_BT[0], batch.vision_columns_BV[0]
    return output.logits[0][batch.answer_positions_A], [layer[0][:, rows][:, :, columns] for layer in output.attentions]


@pytest.mark.parametrize("name", BUILDS)
@torch.no_grad()
def test_logits_and_attention_of_a_long_prompt_are_the_models_own(name, built):
    vlm = load_vlm(built(name))
    batch = batch_of(vlm, [prepared(vlm, LONG)])
    captured = capture(vlm, batch, layers=(0, 1))
    logits_AN, attention = own(built(name), vlm, batch)
    torch.testing.assert_close(vlm.head(captured.hidden_AD), logits_AN, atol=2e-5, rtol=1e-5)
    for layer in (0, 1):
        torch.testing.assert_close(captured.attention[layer][0], attention[layer], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_scale_after_the_head_is_in_every_loss_and_target(built):
    folder = built("scaled")
    vlm = load_vlm(folder)
    objective = Objective(vlm, get_recipe("sft"), None).eval()
    batch = batch_of(vlm, [prepared(vlm, LONG)])
    logits_AN, _ = own(folder, vlm, batch)
    expected = torch.nn.functional.cross_entropy(logits_AN, batch.answer_ids_A)
    assert vlm.logit_scale == pytest.approx(0.3)
    torch.testing.assert_close(objective(batch, DecodedTargets()).get("loss"), expected)
    mean_N = calibrate(vlm, [batch]).mean_probability_N
    torch.testing.assert_close(mean_N, logits_AN.softmax(dim=1).mean(dim=0))


def test_sinks_send_gradients_and_recomputed_activations_give_the_same(built):
    found = []
    for recompute in (False, True):
        vlm = load_vlm(built("sinks"))
        objective = Objective(vlm, get_recipe("sft"), None).train()
        if recompute:
            objective.recompute_activations()
        captured = capture(vlm, batch_of(vlm, [prepared(vlm, LONG)]))
        captured.attention[0].square().sum().backward()
        found.append({n: p.grad for n, p in vlm.model.named_parameters() if p.grad is not None})
    assert any("sinks" in name for name in found[0])
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["scaled", "sparse", "sinks", "window"])
def test_rounding_of_a_half_precision_is_no_difference(name, dtype, built):
    vlm = load_vlm(built(name), dtype=dtype)
    enable_capture(vlm)
    assert vlm.logit_scale == pytest.approx(0.3 if name == "scaled" else 1.0)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "paligemma", "smolvlm", "minigpt4", "instructblip"])
def test_families_pass_the_comparison_in_half_precision(name, written):
    enable_capture(load_vlm(written(name), dtype=torch.bfloat16))


# What does not fit is refused


def test_a_keyword_that_the_kernel_does_not_use_is_an_error_that_names_it_and_the_model(built):
    vlm = load_vlm(built("sinks"))
    vlm.decoder.config._attn_implementation = "sdpa"
    with pytest.raises(CheckpointError, match="GptOssAttention gives its attention s_aux"):
        enable_capture(vlm)


def test_keywords_that_say_nothing_pass(built):
    vlm = load_vlm(built("window"))
    batch = batch_of(vlm, [prepared(vlm, LONG)])
    attention = vlm.decoder.layers[0].self_attn
    kernel._check_keywords(attention, batch, None, {"softcap": None, "position_ids": torch.ones(1), "sliding_window": 16})
    for name in ("softcap", "position_bias", "sinks", "indices", "anything"):
        with pytest.raises(CheckpointError, match=f"MistralAttention gives its attention {name},"):
            kernel._check_keywords(attention, batch, None, {name: torch.ones(1)})


def test_logits_that_no_number_of_the_configuration_explains_are_refused(built, monkeypatch):
    vlm = load_vlm(built("granite"))
    monkeypatch.setattr(vlm.model.lm_head, "bias", torch.nn.Parameter(torch.zeros(vlm.vocabulary)))
    forward = vlm.model.forward

    def capped(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = torch.tanh(output.logits)
        return output

    monkeypatch.setattr(vlm.model, "forward", capped)
    with pytest.raises(CheckpointError, match=r"not those of its output head.*logits_scaling = 8\.0"):
        enable_capture(vlm)


def test_a_scale_after_a_head_with_a_bias_is_refused(built, monkeypatch):
    vlm = load_vlm(built("scaled"))
    bias = torch.linspace(-1, 1, vlm.vocabulary)
    vlm.model.lm_head.bias = torch.nn.Parameter(bias)
    with pytest.raises(CheckpointError, match=r"scaled after an output head with a bias.*logits_scaling"):
        enable_capture(vlm)


def test_a_head_with_a_bias_passes(built):
    vlm = load_vlm(built("window"))
    vlm.model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, vlm.vocabulary))
    enable_capture(vlm)
    assert vlm.logit_scale == 1


def test_attention_that_differs_from_the_slow_kernels_is_refused_with_the_difference(built, monkeypatch):
    original = kernel.text_to_vision
    monkeypatch.setattr(kernel, "text_to_vision", lambda *given: original(*given[:3], 1.05 * given[3], *given[4:]))
    vlm = load_vlm(built("window"))
    with pytest.raises(CheckpointError, match=r"captured in layer 0 is not the model's own: .* off by"):
        enable_capture(vlm)


def test_a_prompt_is_longer_than_windows_and_blocks(built, written):
    for name, reach in (("window", 16), ("chunks", 16), ("sparse", 8 * 6)):
        vlm = load_vlm(built(name))
        assert length_beyond_reach(vlm, len(noise_prompt(vlm).input_ids)) == reach + 64
    vlm = load_vlm(written("llava"))
    assert length_beyond_reach(vlm, len(noise_prompt(vlm).input_ids)) == 64


def test_the_comparison_leaves_modes_random_numbers_and_kernels_as_they_were(written):
    vlm = load_vlm(written("llava"))
    vlm.model.train()
    vlm.tower.eval()
    modes = [module.training for module in vlm.model.modules()]
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    enable_capture(vlm)
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in vlm.model.modules()] == modes
    assert vlm.decoder.config._attn_implementation == "sdpa"
    assert all(parameter.grad is None for parameter in vlm.model.parameters())


def test_a_cap_of_logits_is_refused_by_name(tmp_path):
    make_gemma3.write(tmp_path, final_logit_softcapping=30.0)
    with pytest.raises(CheckpointError, match=r"capped at 30\.0 \(final_logit_softcapping\)"):
        enable_capture(load_vlm(tmp_path))


def test_what_show_saves_is_all_that_the_model_alone_needs(built):
    vlm = load_vlm(built("sparse"))
    given = prepared(vlm, LONG)
    with torch.no_grad():
        arrays = captured_arrays(vlm, Prepared(given, "", truncated=False))
    assert {"image_grid_thw", *given.image_inputs, *given.token_inputs} <= arrays.keys()
