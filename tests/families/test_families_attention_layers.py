"""Attention of every layer, of every family, against the eager kernel."""

from __future__ import annotations

import pytest
import torch
from checkpoints import FAMILIES
from conversations import suiting
from family_conformance import batch_of, prepared
from plain_transformers import forward, plain_inputs, plain_model

from alignkd.capture.attention import capture
from alignkd.models.loading import load_vlm


@pytest.mark.parametrize("name", FAMILIES)
def test_captured_layers_are_those_of_the_eager_kernel(written, name):
    family, folder = FAMILIES[name], written(name)
    vlm, eager = load_vlm(folder), plain_model(folder, "eager")
    conversation = next(one for one in suiting(family) if one.sizes)
    inputs = plain_inputs(folder, name, family, conversation)
    expected = forward(eager, inputs, output_attentions=True).attentions
    is_image = inputs["input_ids"][0] == vlm.image_token_id
    columns = is_image.nonzero().squeeze(1)
    rows = (~is_image & (torch.arange(len(is_image)) > columns[0])).nonzero().squeeze(1)
    with torch.no_grad():
        captured = capture(vlm, batch_of(vlm, [prepared(vlm, conversation)]), layers=range(vlm.layers))
    assert len(expected) == vlm.layers == len(captured.attention) > 1
    for layer, attention in captured.attention.items():
        torch.testing.assert_close(attention[0], expected[layer][0][:, rows][:, :, columns], atol=1e-5, rtol=0)
