"""What single families do that no other does: PaliGemma's prefix, Gemma's caps and windows, tiles, deepstack.

Shapes: R regions, L ids, S positions, H heads, T text rows, V vision columns.
"""

from __future__ import annotations

import json

import make_gemma3
import make_paligemma
import pytest
import torch
from checkpoints import FAMILIES
from conversations import ONE, Conversation
from family_conformance import LENGTH, batch_of, captured_of, prepared
from plain_transformers import forward, plain_inputs, plain_model

from alignkd.capture.attention import capture, enable_capture
from alignkd.inputs.prompts import IGNORE, PromptError
from alignkd.models.loading import load_vlm

LONG = Conversation(
    "long", (("human", "<image>\nWhat colour is the cat, and which colour is the mat?"), ("gpt", "a dog")), ((90, 40),)
)


def first_layer(folder, name, conversation):
    """Eager attention of text rows to vision columns ``[H, T, V]`` by transformers alone."""
    vlm, inputs = load_vlm(folder), plain_inputs(folder, name, FAMILIES[name], conversation)
    whole_HSS = forward(plain_model(folder, "eager"), inputs, output_attentions=True).attentions[0][0]
    vision_S = inputs["input_ids"][0] == vlm.image_token_id
    columns = vision_S.nonzero().squeeze(1)
    rows = [row for row in range(int(columns[0]), len(vision_S)) if not vision_S[row]]
    return vlm, whole_HSS[:, rows][:, :, columns]


# PaliGemma


def test_paligemma_supervises_what_its_processor_labels(written):
    vlm = load_vlm(written("paligemma"))
    made = prepared(vlm, ONE)
    theirs = vlm.processor(
        text=["<image>What colour is the cat?"], images=[ONE.images], suffix=[ONE.answers[0]], return_tensors="np"
    )
    assert made.labels.tolist() == theirs["labels"][0].tolist()
    assert (made.labels != IGNORE).sum() == made.token_inputs["token_type_ids"].sum()


def test_paligemma_sees_its_question_both_ways_and_its_answer_one_way(written):
    vlm = load_vlm(written("paligemma"))
    batch = batch_of(vlm, [prepared(vlm, ONE)])
    types_S = batch.token_inputs["token_type_ids"][0]
    vlm.model.requires_grad_(False)
    states = []
    embed = vlm.model.get_input_embeddings()
    for place in (None, int((types_S == 0).nonzero()[-1]), len(types_S) - 1):
        hook = embed.register_forward_hook(lambda _m, _i, out, place=place: _disturbed(out, place))
        states.append(vlm.decode(batch, vlm.encode_images(batch))[0])
        hook.remove()
    differ = [(state - states[0]).abs().amax(dim=1) > 1e-6 for state in states[1:]]
    assert differ[0].all(), "the last token of the question is seen by all"
    assert differ[1].nonzero().flatten().tolist() == [len(types_S) - 1]


def _disturbed(embedded_BSD, place):
    if place is None:
        return embedded_BSD
    changed = embedded_BSD.clone()
    changed[:, place] += 1.0
    return changed


@pytest.mark.parametrize(
    ("turns", "images", "message"),
    [
        ((("human", "What?"), ("gpt", "a")), 0, "it has no image"),
        ((("human", "<image>"), ("gpt", "a"), ("human", "b"), ("gpt", "c")), 1, "one question and one answer"),
        ((("human", "<image> a"), ("gpt", "b")), 2, "names 1 images, the sample has 2"),
        ((("human", "<image> a<eos>"), ("gpt", "b")), 1, "special token '<eos>'"),
    ],
)
def test_paligemma_refuses_what_its_prefix_cannot_hold(written, turns, images, message):
    encoder = load_vlm(written("paligemma")).encoder("prefix", LENGTH)
    with pytest.raises(PromptError, match=message):
        encoder.plan(turns, images, [(32, 32)] * images)


def test_paligemma_knows_no_chat_template(written):
    with pytest.raises(ValueError, match="known are prefix"):
        load_vlm(written("paligemma")).encoder("chat", LENGTH)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({}, "attn_logit_softcapping"), ({"attn_logit_softcapping": None}, "logits are capped at 30.0")],
)
def test_paligemma_2_is_refused_for_its_caps(tmp_path, changes, message):
    make_paligemma.write_second_generation(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        enable_capture(load_vlm(tmp_path))


# Gemma 3


def test_gemma3_with_capped_logits_is_refused(tmp_path):
    make_gemma3.write(tmp_path, final_logit_softcapping=30.0)
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        enable_capture(load_vlm(tmp_path))


@pytest.mark.parametrize("kind", ["sliding_attention", "full_attention"])
def test_gemma3_attention_is_that_of_its_first_layers_window(tmp_path, kind):
    make_gemma3.write(tmp_path, layer_types=[kind, "full_attention"])
    vlm, expected_HTV = first_layer(tmp_path, "gemma3", LONG)
    captured, _ = captured_of(vlm, LONG)
    torch.testing.assert_close(captured.attention[0][0], expected_HTV, atol=1e-5, rtol=0)
    beyond = expected_HTV[:, 15:]  # the window is of 12 positions
    assert beyond.shape[1] > 5
    assert bool(beyond.any()) == (kind == "full_attention")


# Tiles


@pytest.mark.parametrize("name", ["smolvlm", "idefics3"])
@pytest.mark.parametrize(("size", "grid"), [((64, 64), (2, 2)), ((90, 30), (1, 2)), ((30, 90), (2, 1))])
def test_tiles_are_numbered_by_row_and_column_and_the_whole_image_is_last(written, name, size, grid):
    vlm = load_vlm(written(name))
    made = prepared(vlm, Conversation("tiles", ONE.turns, (size,)))
    rows, columns = grid
    corners = [(row, column) for row in range(rows) for column in range(columns)]
    expected = [[row / rows, column / columns, (row + 1) / rows, (column + 1) / columns] for row, column in corners]
    assert made.regions_R8[:, 4:].tolist() == [*expected, [0, 0, 1, 1]]
    assert made.images.shape == (1, rows * columns + 1, 3, 32, 32)


@pytest.mark.parametrize("name", ["smolvlm", "idefics3"])
def test_an_image_that_is_not_split_is_one_region(written, tmp_path, name):
    load_vlm(written(name)).save(tmp_path)
    path = tmp_path / "processor_config.json"
    settings = json.loads(path.read_text())
    settings["image_processor"]["do_image_splitting"] = False
    path.write_text(json.dumps(settings))
    made = prepared(load_vlm(tmp_path), ONE)
    assert made.regions_R8.tolist() == [[0, 2, 2, 0, 0, 0, 1, 1]]


def test_smolvlm_without_the_package_that_its_processor_wants_says_which(written, monkeypatch):
    folder = written("smolvlm")
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", None)
    with pytest.raises(ValueError, match="pip install num2words"):
        load_vlm(folder)


# Deepstack


def test_qwen3_trains_every_projector_of_its_tower(written):
    vlm = load_vlm(written("qwen3_vl"))
    vlm.freeze_tower()
    capture(vlm, batch_of(vlm, [prepared(vlm, ONE)])).hidden_AD.sum().backward()
    for merger in [vlm.model.model.visual.merger, *vlm.model.model.visual.deepstack_merger_list]:
        assert all(p.requires_grad for p in merger.parameters())
        assert any(p.grad is not None and p.grad.any() for p in merger.parameters())
    assert all(p.grad is None for p in vlm.model.model.visual.blocks.parameters())
