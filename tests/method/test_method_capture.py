"""Batches and captures: positions, independence of neighbours, exactness against the eager kernel, gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import IMAGE, batch_of, eager_attention, mixture, reference, sample, write_checkpoint

from alignkd.capture import probabilities as capture_module
from alignkd.capture.attention import capture
from alignkd.inputs.batch import collate, expand
from alignkd.inputs.prompts import IGNORE, encode_conversation
from alignkd.losses.recipes import Recipe
from alignkd.models.loading import load_vlm
from alignkd.objective import Objective
from tests.reference.attention import first_attention


@pytest.fixture(scope="module")
def vlm(tiny_folder):
    """One grouped-heads model for the tests here that change no weights."""
    return load_vlm(tiny_folder)


def run(vlm, samples, **kwargs):
    batch = batch_of(vlm, samples)
    captured = capture(vlm, batch, **kwargs)
    return batch, captured, vlm.model.lm_head(captured.hidden_AD)


def cut(batch, captured, logits, i):
    """The real values of sample i of a batch: attention, vision tokens, logits."""
    rows, columns = batch.text_mask_BT[i].sum(), batch.vision_mask_BV[i].sum()
    attention = captured.attention[0][i, :, :rows, :columns]
    return attention, captured.vision_BVD[i, :columns], logits[batch.answer_samples_A == i]


def q_and_k(vlm):
    layer = first_attention(vlm)
    return [layer.q_proj.weight, layer.k_proj.weight]


# --- positions ---------------------------------------------------------------------------------------------------------

TOKENS = st.lists(st.one_of(st.integers(3, 500), st.just(IMAGE)), min_size=1, max_size=12)


@given(TOKENS, st.integers(1, 4), st.data())
def test_every_position_is_found_from_the_ids(tokens, per_image, data):
    labels = [t if t != IMAGE and data.draw(st.booleans()) else IGNORE for t in tokens]
    layout = expand(np.array(tokens), np.array(labels), per_image)
    kinds: list[tuple[str, int, int]] = []
    for token, label in zip(tokens, labels, strict=True):
        kinds += [("vision", IMAGE, IGNORE)] * per_image if token == IMAGE else [("text", token, label)]
    first = next((i for i, (kind, _, _) in enumerate(kinds) if kind == "vision"), len(kinds))
    assert layout.input_ids.tolist() == [token for _, token, _ in kinds]
    assert layout.vision_columns.tolist() == [i for i, (kind, _, _) in enumerate(kinds) if kind == "vision"]
    assert layout.text_rows.tolist() == [i for i, (kind, _, _) in enumerate(kinds) if kind == "text" and i > first]
    predicting = [i - 1 for i, (_, _, label) in enumerate(kinds) if i > 0 and label != IGNORE]
    assert layout.answers.tolist() == predicting
    assert layout.answer_ids.tolist() == [kinds[i + 1][2] for i in predicting]


def test_a_batch_names_the_sample_of_every_answer_and_the_place_of_every_vision_token(vlm):
    samples = mixture(vlm)
    batch = batch_of(vlm, samples)
    assert batch.samples == 6
    assert torch.bincount(batch.answer_samples_A, minlength=6).tolist() == [3, 5, 4, 2, 3, 0]
    assert batch.vision_mask_BV.sum(1).tolist() == [4, 4, 0, 8, 8, 4]
    assert batch.images.shape[0] == 7
    length = batch.input_ids_BS.shape[1]
    assert (batch.answer_positions_A // length).tolist() == batch.answer_samples_A.tolist()
    following = batch.input_ids_BS.flatten()[batch.answer_positions_A + 1]
    assert following.tolist() == batch.answer_ids_A.tolist()
    assert (batch.input_ids_BS.gather(1, batch.vision_columns_BV)[batch.vision_mask_BV] == IMAGE).all()
    assert batch.vision_slots.tolist() == batch.vision_mask_BV.flatten().nonzero().squeeze(1).tolist()


# --- a sample's values do not depend on its batch ----------------------------------------------------------------------


def assert_each_alone(vlm, samples):
    with torch.no_grad():
        together = run(vlm, samples)
        for i, one in enumerate(samples):
            alone = run(vlm, [one])
            for found, expected in zip(cut(*together, i), cut(*alone, 0), strict=True):
                assert found.shape == expected.shape
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_batch_of_any_mixture_gives_each_sample_its_values_alone(vlm):
    assert_each_alone(vlm, mixture(vlm))


@settings(max_examples=10)
@given(st.lists(TOKENS, min_size=1, max_size=4), st.integers(0, 3))
def test_a_batch_of_random_orders_of_text_and_images_gives_each_sample_its_values_alone(vlm, texts, answers):
    assert_each_alone(vlm, [sample(vlm, [1, *t, 9], answers=min(answers, len(t)), seed=i) for i, t in enumerate(texts)])


def test_a_sample_that_ends_with_its_image_has_no_text_rows(vlm):
    # What truncation may leave, and what a question of the plain template is.
    with torch.no_grad():
        _, captured, _ = run(vlm, [sample(vlm, [1, 5, 6, IMAGE], answers=0)])
        assert captured.attention[0].shape == (1, 4, 0, 4)
        assert_each_alone(vlm, [sample(vlm, [1, 5, IMAGE, 7, 8]), sample(vlm, [1, 5, 6, IMAGE], answers=0)])


def test_a_batch_of_both_templates_with_and_without_image_gives_each_sample_its_values_alone(vlm):
    conversations = [
        ("plain", [("human", "<image>\nDescribe."), ("gpt", "A striped pattern")]),
        ("v1", [("human", "<image>\nWhat?"), ("gpt", "Green"), ("human", "Sure?"), ("gpt", "Yes")]),
        ("v1", [("human", "Two and two?"), ("gpt", "Four")]),
        ("v1", [("human", "Compare <image> and <image>"), ("gpt", "Same")]),
        ("v1", [("human", "First <image>"), ("gpt", "A"), ("human", "Then <image>"), ("gpt", "B")]),
    ]
    samples = []
    for i, (template, turns) in enumerate(conversations):
        has_image = "<image>" in turns[0][1]
        encoded = encode_conversation(turns, template=template, tokenizer=vlm.tokenizer, has_image=has_image, max_length=512)
        one = sample(vlm, encoded.input_ids.tolist(), seed=i)
        samples.append(type(one)(encoded.input_ids, encoded.labels, one.images))
    assert_each_alone(vlm, samples)


def test_a_batch_of_text_alone_has_logits_and_no_vision(vlm):
    samples = [sample(vlm, [1, 5, 6, 7, 8]), sample(vlm, [1, 9, 10, 11, 12, 13, 14])]
    _, captured, logits = run(vlm, samples)
    assert captured.attention[0].numel() == captured.vision_BVD.numel() == 0
    assert logits.shape == (6, vlm.vocabulary)
    assert_each_alone(vlm, samples)


def test_padding_holds_zeros_and_nothing_else(vlm):
    batch, captured, _ = run(vlm, mixture(vlm))
    real = batch.text_mask_BT[:, None, :, None] & batch.vision_mask_BV[:, None, None, :]
    assert (captured.attention[0].masked_select(~real) == 0).all()
    assert (captured.vision_BVD[~batch.vision_mask_BV] == 0).all()


def test_other_ids_in_the_padding_change_nothing(vlm):
    samples = mixture(vlm)
    with torch.no_grad():
        first = run(vlm, samples)
        batch = collate(samples, tokens_per_placeholder=vlm.vision_tokens_per_image, pad_token_id=77)
        captured = capture(vlm, batch)
    torch.testing.assert_close(captured.attention[0], first[1].attention[0], rtol=0, atol=0)
    torch.testing.assert_close(captured.hidden_AD, first[1].hidden_AD, rtol=0, atol=0)


def test_tower_features_serve_as_well_as_pixels(vlm):
    with torch.no_grad():
        _, by_pixels, _ = run(vlm, mixture(vlm))
        featured = [
            type(s)(s.input_ids, s.labels, vlm.model.model.run_tower(s.images) if len(s.images) else s.images)
            for s in mixture(vlm)
        ]
        _, by_features, _ = run(vlm, featured)
    torch.testing.assert_close(by_features.attention[0], by_pixels.attention[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(by_features.vision_BVD, by_pixels.vision_BVD, rtol=1e-5, atol=1e-5)


# --- exactness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "key_value_heads"), [(4, 4), (4, 2), (6, 1)])
def test_captured_attention_is_that_of_the_eager_kernel(tmp_path, heads, key_value_heads):
    write_checkpoint(tmp_path / "model", num_attention_heads=heads, num_key_value_heads=key_value_heads)
    vlm = load_vlm(tmp_path / "model")
    samples = mixture(vlm)
    with torch.no_grad():
        together = run(vlm, samples)
        for i, one in enumerate(samples):
            if len(one.images):
                torch.testing.assert_close(cut(*together, i)[0], eager_attention(vlm, one), rtol=0, atol=1e-5)


def test_a_text_row_between_two_images_sees_the_earlier_one_alone(vlm):
    one = sample(vlm, [1, 60, IMAGE, 61, 62, 63, IMAGE, 64, 65], seed=4)
    with torch.no_grad():
        batch, captured, _ = run(vlm, [one])
    assert batch.text_rows_BT.tolist() == [[6, 7, 8, 13, 14]]
    assert batch.vision_columns_BV.tolist() == [[2, 3, 4, 5, 9, 10, 11, 12]]
    between, after = captured.attention[0][0, :, :3], captured.attention[0][0, :, 3:]
    assert (between[..., 4:] == 0).all()
    assert (between[..., :4] > 0).all()
    assert (after > 0).all()


def test_a_row_of_captured_attention_holds_part_of_a_distribution(vlm):
    with torch.no_grad():
        _, captured, _ = run(vlm, mixture(vlm))
    mass = captured.attention[0].sum(3)
    assert (captured.attention[0] >= 0).all()
    assert (mass < 1).all()
    assert captured.attention[0].dtype == torch.float32


def test_outputs_are_the_same_with_capture_on_and_off(tiny):
    batch = batch_of(tiny, mixture(tiny))
    inputs = {"input_ids": batch.input_ids_BS, "attention_mask": batch.attention_mask_BS, "pixel_values": batch.images}
    with torch.no_grad():
        untouched = tiny.model(**inputs, use_cache=False).logits.flatten(0, 1)[batch.answer_positions_A]
        on = tiny.model.lm_head(capture(tiny, batch).hidden_AD)
        off = tiny.model.lm_head(capture(tiny, batch, attention=False).hidden_AD)
    assert torch.equal(on, off)
    torch.testing.assert_close(on, untouched, rtol=0, atol=1e-5)
    assert capture(tiny, batch, attention=False).attention == {}


def test_nothing_of_an_earlier_batch_is_left_in_the_next(vlm):
    samples = mixture(vlm)
    with torch.no_grad():
        expected = run(vlm, samples[:2])[1].attention[0]
        run(vlm, samples[3:])
        run(vlm, samples[:2], attention=False)
        assert torch.equal(run(vlm, samples[:2])[1].attention[0], expected)


# --- gradients ---------------------------------------------------------------------------------------------------------


def weighted(attention):
    """A function of the attention that no symmetry makes trivial."""
    weight = torch.linspace(-1, 2, attention.numel()).reshape(attention.shape)
    return (attention * weight).sum() + (attention.square() * weight.flip(0)).sum()


@pytest.mark.parametrize("tokens", [[1, 5, IMAGE, 7, 8, 9], [1, 60, IMAGE, 61, IMAGE, 64, 65]])
def test_gradients_of_captured_attention_are_those_of_the_eager_kernel(vlm, tokens):
    one = sample(vlm, tokens)
    captured = run(vlm, [one])[1].attention[0][0]
    found = torch.autograd.grad(weighted(captured), q_and_k(vlm))
    expected = torch.autograd.grad(weighted(eager_attention(vlm, one)), q_and_k(vlm))
    for a, b in zip(found, expected, strict=True):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_attention_of_the_restatement_has_the_same_gradient(tmp_path):
    import json

    state = write_checkpoint(tmp_path / "model")
    vlm = load_vlm(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    tower = json.loads((tmp_path / "model" / "clip" / "config.json").read_text())
    one = sample(vlm, [1, 60, IMAGE, 61, IMAGE, 64, 65])
    names = [f"model.layers.0.self_attn.{n}_proj.weight" for n in "qk"]
    leaves = [state[n].requires_grad_() for n in names]
    batch, captured, _ = run(vlm, [one])
    attention = reference(state, config, tower, one.input_ids, one.images).attention
    attention = attention[:, batch.text_rows_BT[0]][:, :, batch.vision_columns_BV[0]]
    expected = torch.autograd.grad(weighted(attention), leaves)
    found = torch.autograd.grad(weighted(captured.attention[0][0]), q_and_k(vlm))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def gradients_of_everything(vlm, samples):
    vlm.model.zero_grad()
    _, captured, logits = run(vlm, samples)
    loss = weighted(captured.attention[0]) + captured.vision_BVD.square().mean() + logits.square().mean()
    loss.backward()
    return {name: p.grad.clone() for name, p in vlm.model.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_recomputed_activations_give_the_same_gradients_as_kept_ones(tiny):
    objective = Objective(tiny, Recipe(), None)
    objective.train()
    expected = gradients_of_everything(tiny, mixture(tiny))
    objective.recompute_activations()
    found = gradients_of_everything(tiny, mixture(tiny))
    assert tiny.model.model.language_model.layers[0].gradient_checkpointing
    assert_same_gradients(found, expected)
    assert expected["model.language_model.layers.0.self_attn.q_proj.weight"].abs().max() > 1e-3


@pytest.mark.parametrize("at_once", [1, 6 * 4 * 24 * 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_rows_captured_in_chunks_give_the_same_values_and_gradients(tiny, monkeypatch, at_once, checkpointing):
    objective = Objective(tiny, Recipe(), None)
    objective.train()
    if checkpointing:
        objective.recompute_activations()
    expected_values = run(tiny, mixture(tiny))[1].attention[0]
    expected = gradients_of_everything(tiny, mixture(tiny))
    monkeypatch.setattr(capture_module, "_MAX_SCORES", at_once)
    calls = []
    original = capture_module._scores
    monkeypatch.setattr(capture_module, "_scores", lambda *a: calls.append(a[2]) or original(*a))
    values = run(tiny, mixture(tiny))[1].attention[0]
    assert len(calls) > 1
    torch.testing.assert_close(values, expected_values, rtol=1e-4, atol=1e-6)
    assert_same_gradients(gradients_of_everything(tiny, mixture(tiny)), expected)


def test_between_the_passes_no_scores_of_all_keys_are_kept(tiny):
    one = sample(tiny, [1, 60, IMAGE, *range(61, 90)])
    batch = batch_of(tiny, [one])
    rows, positions, heads = batch.text_rows_BT.shape[1], batch.input_ids_BS.shape[1], tiny.heads
    query = torch.randn(1, heads, rows, 4, requires_grad=True)
    key = torch.randn(1, heads, positions, 4, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        attention = capture_module.text_to_vision(query, key, batch, 0.5)
    assert attention.requires_grad
    assert sum(t.numel() for t in kept) < rows * positions * heads


def test_half_precision_autocast_runs_and_stays_near_full_precision(tiny):
    samples = mixture(tiny)
    expected = run(tiny, samples)
    with torch.autocast("cpu", torch.bfloat16):
        _, captured, logits = run(tiny, samples)
        loss = (
            captured.attention[0].square().sum() + captured.vision_BVD.float().square().mean() + logits.float().square().mean()
        )
    loss.backward()
    assert captured.attention[0].dtype == torch.float32
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in tiny.model.parameters() if p.grad is not None)
    assert (captured.attention[0] - expected[1].attention[0]).abs().max() < 0.2
    assert (captured.attention[0].sum(3) <= 1 + 1e-5).all()


def test_a_model_in_half_precision_captures_in_float32(tiny_folder):
    vlm = load_vlm(tiny_folder, dtype=torch.bfloat16)
    with torch.no_grad():
        _, captured, logits = run(vlm, mixture(vlm))
    assert captured.attention[0].dtype == torch.float32
    assert captured.vision_BVD.dtype == logits.dtype == torch.bfloat16
    assert captured.attention[0].isfinite().all()
    assert logits.isfinite().all()
