"""InstructBLIP: what the Q-Former reads, what is trained, and what is refused by name."""

from __future__ import annotations

import json

import make_instructblip
import numpy as np
import pytest
import torch
from PIL import Image

from alignkd.inputs.prompts import IGNORE
from alignkd.losses.recipes import get_recipe
from alignkd.models.loading import load_vlm
from alignkd.objective import Objective

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("instructblip") / "model"
    make_instructblip.write(folder)
    return folder


@pytest.fixture(scope="module")
def vlm(folder):
    return load_vlm(folder)


def made(vlm, turns, images=1):
    encoder = vlm.encoder("instruction", 512)
    return encoder.finish(turns, encoder.plan(turns, images), [encoder.load(PICTURE)] * images)[0]


def batch_of(vlm, inputs):
    return vlm.collate(inputs)


def seen(vlm, inputs):
    with torch.no_grad():
        return vlm.encode_images(batch_of(vlm, inputs)).tokens_MD


def test_the_q_former_reads_the_first_question_and_nothing_after_it(vlm):
    short = made(vlm, [("human", "<image>\nwhat is it?"), ("gpt", "red")])
    long = made(vlm, [("human", "<image>\nwhat is it?"), ("gpt", "the cat"), ("human", "which is red?"), ("gpt", "the mat")])
    read = vlm.processor.qformer_tokenizer.decode(short.image_inputs["qformer_input_ids"][0], skip_special_tokens=True)
    assert read == "what is it?"
    for name in ("qformer_input_ids", "qformer_attention_mask"):
        assert torch.equal(short.image_inputs[name], long.image_inputs[name])
    assert torch.equal(seen(vlm, [short]), seen(vlm, [long]))


def test_vision_tokens_depend_on_the_question(vlm):
    one, other = (made(vlm, [("human", f"<image>\n{text}"), ("gpt", "red")]) for text in ("what is it?", "which colour is it?"))
    assert (seen(vlm, [one]) - seen(vlm, [other])).abs().max() > 1e-3


def test_each_image_is_read_for_the_question_of_its_own_sample(vlm):
    inputs = [
        made(vlm, [("human", "<image>\nwhat is it?"), ("gpt", "red")]),
        made(vlm, [("human", "<image><image>\nwhich colour is the cat?"), ("gpt", "red")], images=2),
        made(vlm, [("human", "no image at all"), ("gpt", "red")], images=0),
    ]
    together, alone = seen(vlm, inputs), torch.cat([seen(vlm, [one]) for one in inputs[:2]])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone[4:8], alone[8:12])
    assert (alone[:4] - alone[4:8]).abs().max() > 1e-3


def test_the_question_is_a_prompt_and_the_answer_with_its_end_is_learned(vlm):
    one = made(vlm, [("human", "<image>\nwhat is it?"), ("gpt", "a dog")])
    start, end = vlm.tokenizer.bos_token_id, vlm.tokenizer.eos_token_id
    assert one.input_ids[:5].tolist() == [vlm.image_token_id] * 4 + [start]
    assert vlm.tokenizer.decode(one.input_ids[5:][one.labels[5:] == IGNORE]) == "what is it?"
    assert one.labels[-1] == end
    assert vlm.tokenizer.decode(one.labels[one.labels != IGNORE][:-1]) == "a dog"


def test_the_q_former_and_its_queries_are_trained_and_the_vision_model_is_not(folder):
    vlm = load_vlm(folder)
    objective = Objective(vlm, get_recipe("sft"), None).train()
    batch = batch_of(vlm, [made(vlm, [("human", "<image>\nwhat is it?"), ("gpt", "a dog")])])
    hidden = vlm.decode(batch, vlm.encode_images(batch))
    hidden.square().sum().backward()
    assert vlm.model.query_tokens.grad.abs().sum() > 0
    assert all(p.grad is not None for p in vlm.model.qformer.encoder.parameters())
    assert all(p.grad is None and not p.requires_grad for p in vlm.model.vision_model.parameters())
    assert objective.training
    assert not vlm.model.vision_model.training


def test_a_question_too_long_for_the_q_former_is_refused_by_name(vlm):
    with pytest.raises(ValueError, match=r"its question has 5[0-9] word pieces, the Q-Former reads 40 at most"):
        made(vlm, [("human", "<image>\n" + "is it red? " * 12), ("gpt", "red")])


def test_text_that_names_an_image_it_does_not_have_is_refused(vlm):
    with pytest.raises(ValueError, match="holds the special token '<image>'"):
        made(vlm, [("human", "<image>\nwhat is it?"), ("gpt", "red")], images=0)


def test_flan_t5_is_refused_by_name(tmp_path):
    make_instructblip.write(tmp_path / "model", flan_t5=True)
    with pytest.raises(ValueError, match=r"encoder-decoder 't5' \(Flan-T5\)"):
        load_vlm(tmp_path / "model")


def test_a_processor_that_writes_another_number_of_queries_is_refused(tmp_path):
    make_instructblip.write(tmp_path / "model")
    path = tmp_path / "model" / "processor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_query_tokens": 7}))
    with pytest.raises(ValueError, match="its processor writes 7"):
        load_vlm(tmp_path / "model")
