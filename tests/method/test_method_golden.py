"""The values of the reference MobileVLM V2 code, in float32 on a CPU."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny_models import GOLDEN, batch_of
from torch.nn import functional

from alignkd.capture.attention import capture
from alignkd.inputs.batch import ModelInput
from alignkd.inputs.prompts import encode_conversation
from alignkd.models.encoders.image_files import decode_image, read_image_bytes

VALUES = dict(np.load(GOLDEN / "golden.npz"))
SAMPLES = {s["id"]: s for s in json.loads((GOLDEN / "samples.json").read_text())}
CASES = sorted(tuple(k.split("/")[:2]) for k in VALUES if k.endswith("/input_ids"))
MODELS = ("teacher", "student")


def encode(vlm, template, name):
    turns = [(t["from"], t["value"]) for t in SAMPLES[name]["conversations"]]
    return encode_conversation(turns, template=template, tokenizer=vlm.tokenizer, has_image=True, max_length=2048)


def pixels(vlm, name):
    path = GOLDEN / "images" / SAMPLES[name]["image"]
    return vlm.images(decode_image(read_image_bytes(path), str(path)))


def prepared(vlm, template, name):
    encoded = encode(vlm, template, name)
    return ModelInput(encoded.input_ids, encoded.labels, pixels(vlm, name)[None])


def assert_golden(vlm, model, template, name, attention, vision, logits, answer_ids):
    golden = {
        k: VALUES[f"{template}/{name}/{model}/{k}"]
        for k in ("attention_text_to_vision", "vision_tokens", "answer_logits", "loss")
    }
    np.testing.assert_allclose(attention, golden["attention_text_to_vision"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(vision, golden["vision_tokens"], rtol=0, atol=1e-4 * np.abs(golden["vision_tokens"]).max())
    np.testing.assert_allclose(logits, golden["answer_logits"], rtol=0, atol=1e-4 * np.abs(golden["answer_logits"]).max())
    assert float(functional.cross_entropy(logits, answer_ids)) == pytest.approx(float(golden["loss"]), abs=1e-4)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("template", "name"), CASES)
def test_token_ids_and_labels_are_those_of_the_reference(golden_models, model, template, name):
    encoded = encode(golden_models[model], template, name)
    np.testing.assert_array_equal(encoded.input_ids, VALUES[f"{template}/{name}/input_ids"])
    np.testing.assert_array_equal(encoded.labels, VALUES[f"{template}/{name}/labels"])
    assert not encoded.truncated
    assert encoded.images == 1


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", SAMPLES)
def test_pixel_values_are_those_of_the_reference(golden_models, model, name):
    values = pixels(golden_models[model], name)
    assert values.dtype == torch.float32
    np.testing.assert_allclose(values, VALUES[f"pixel_values/{name}"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("template", "name"), CASES)
def test_attention_vision_tokens_logits_and_loss_are_those_of_the_reference(golden_models, model, template, name):
    vlm = golden_models[model]
    batch = batch_of(vlm, [prepared(vlm, template, name)])
    with torch.no_grad():
        captured = capture(vlm, batch)
        logits = vlm.model.lm_head(captured.hidden_AD)
    assert_golden(vlm, model, template, name, captured.attention[0][0], captured.vision_BVD[0], logits, batch.answer_ids_A)


@pytest.mark.parametrize("model", MODELS)
def test_one_batch_of_every_sample_and_both_templates_gives_the_values_of_the_reference(golden_models, model):
    vlm = golden_models[model]
    batch = batch_of(vlm, [prepared(vlm, template, name) for template, name in CASES])
    with torch.no_grad():
        captured = capture(vlm, batch)
        logits = vlm.model.lm_head(captured.hidden_AD)
    for i, (template, name) in enumerate(CASES):
        rows, mine = int(batch.text_mask_BT[i].sum()), batch.answer_samples_A == i
        attention = captured.attention[0][i, :, :rows]
        assert_golden(vlm, model, template, name, attention, captured.vision_BVD[i], logits[mine], batch.answer_ids_A[mine])


def test_the_two_golden_models_share_one_tower_and_one_tokenizer(golden_models):
    from alignkd.models.vlm import module_fingerprint

    teacher, student = golden_models["teacher"], golden_models["student"]
    assert module_fingerprint(teacher.tower) == module_fingerprint(student.tower)
    assert teacher.tokenizer_fingerprint() == student.tokenizer_fingerprint()
    assert teacher.images.fingerprint() == student.images.fingerprint()
    assert teacher.weights_fingerprint() != student.weights_fingerprint()


def test_the_golden_models_have_the_shape_their_configuration_says(golden_models):
    teacher, student = golden_models["teacher"], golden_models["student"]
    assert (teacher.heads, teacher.hidden_size, student.heads, student.hidden_size) == (8, 64, 4, 32)
    assert (student.vision_tokens_per_image, student.vision_grid, student.vocabulary, student.image_token_id) == (
        144,
        (12, 12),
        512,
        -200,
    )
