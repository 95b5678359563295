"""A saved model under transformers' Auto classes, generation and PEFT."""

from __future__ import annotations

import pytest
import torch
from tiny_models import (
    IMAGE,
    batch_of,
    eager_attention,
    sample,
)

from alignkd.capture.attention import capture
from alignkd.models.loading import save_vlm

# --- transformers and PEFT ---------------------------------------------------------------------------------------------


@pytest.fixture
def auto_model(tiny, tmp_path):
    from transformers import AutoModelForImageTextToText

    import alignkd.models.loading  # noqa: F401  registers the family

    save_vlm(tiny, tmp_path / "saved")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", dtype=torch.float32, local_files_only=True)
    return model.eval()


def inputs_for(tiny):
    batch = batch_of(tiny, [sample(tiny, [1, 5, 6, IMAGE, 7, 8, 9, 10], seed=3)])
    return {"input_ids": batch.input_ids_BS, "attention_mask": batch.attention_mask_BS.long(), "pixel_values": batch.images}


def test_transformers_own_loader_opens_a_saved_model(tiny, auto_model):
    with torch.no_grad():
        ours = tiny.model(**inputs_for(tiny)).logits
        torch.testing.assert_close(auto_model(**inputs_for(tiny)).logits, ours, rtol=0, atol=1e-5)


def test_generation_is_the_same_with_and_without_the_cache(tiny, auto_model):
    inputs = inputs_for(tiny)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = auto_model.generate(**inputs, use_cache=True, **settings)
    plain = auto_model.generate(**inputs, use_cache=False, **settings)
    assert cached.tolist() == plain.tolist()
    length = inputs["input_ids"].shape[1]
    assert cached.shape[1] == length + 12
    with torch.no_grad():
        forced = auto_model(input_ids=cached, pixel_values=inputs["pixel_values"]).logits[0, length - 1 : -1].argmax(1)
    assert cached[0, length:].tolist() == forced.tolist()


def test_generation_works_after_a_capture_of_the_same_length(tiny):
    # The capture's request stays with the first layer for the backward pass; it must not reach into another forward pass.
    ids = [1, 5, 6, IMAGE, 7, 8, 9, 10]
    inputs = inputs_for(tiny)
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    before = tiny.model.generate(**inputs, **settings)
    capture(tiny, batch_of(tiny, [sample(tiny, ids, seed=s) for s in range(3)]))
    assert tiny.model.generate(**inputs, **settings).tolist() == before.tolist()


def test_lora_adapters_train(tiny, auto_model):
    from peft import LoraConfig, get_peft_model

    targets = r".*language_model.*\.(q_proj|v_proj)"
    model = get_peft_model(auto_model, LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False))
    inputs = inputs_for(tiny)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] < 0, -100)
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    assert loss.isfinite()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 8  # two maps, A and B, of two layers
    assert all("lora_" in name and grad.abs().sum() > 0 for name, grad in trained.items())


def test_lora_adapters_are_captured_too(tiny):
    from peft import LoraConfig, get_peft_model

    one = sample(tiny, [1, 5, 6, IMAGE, 7, 8, 9, 10])
    before = capture(tiny, batch_of(tiny, [one])).attention[0]
    config = LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|k_proj)", init_lora_weights=False)
    model = get_peft_model(tiny.model, config).get_base_model()
    captured = capture(tiny, batch_of(tiny, [one])).attention[0]
    captured.square().sum().backward()
    assert (captured - before).abs().max() > 1e-4
    torch.testing.assert_close(captured[0].detach(), eager_attention(tiny, one).detach(), rtol=0, atol=1e-5)
    layer = model.model.language_model.layers[0].self_attn
    assert layer.q_proj.lora_A["default"].weight.grad.abs().sum() > 0
