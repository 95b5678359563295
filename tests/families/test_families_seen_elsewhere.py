"""Checkpoints as others write them: other towers, older layouts, other names of parts. Each of these was once met in a folder.

Shapes: B samples, V vision columns, D width, R regions.
"""

from __future__ import annotations

import json
import shutil

import make_llava
import numpy as np
import pytest
import torch
from conversations import CONVERSATIONS, ONE
from family_conformance import batch_of, prepared
from tiny_parts import text_settings, tower_settings
from tiny_tokenizers import byte_level, sentencepiece
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    PixtralVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from alignkd.capture.attention import capture
from alignkd.inputs.prompts import IGNORE
from alignkd.inputs.regions import tokens_of
from alignkd.losses.terms import vision_loss
from alignkd.models.encoders.processors import without_videos
from alignkd.models.loading import load_vlm, save_vlm
from alignkd.pipeline.training.lora import LoraSettings, add_lora, merge_lora

MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST]{% for c in m['content'] %}"
    "{% if c['type'] == 'text' %}{{ c['text'] }}{% else %}[IMG]{% endif %}{% endfor %}[/INST]"
    "{% else %}{{ m['content'][0]['text'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
TURNS = next(conversation for conversation in CONVERSATIONS if conversation.name == "turns")
TWO = next(conversation for conversation in CONVERSATIONS if conversation.name == "two")


@pytest.fixture
def copied(written, tmp_path):
    """A LLaVA folder to change."""
    return shutil.copytree(written("llava"), tmp_path / "model")


@pytest.fixture(scope="module")
def pixtral(tmp_path_factory):
    """A LLaVA with Pixtral's tower and processor, as ``mistral-community/pixtral-12b``."""
    folder = tmp_path_factory.mktemp("pixtral")
    tokenizer = byte_level(["[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"], bos="<s>", eos="</s>", pad="<pad>")
    images = PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size={"height": 8, "width": 8})
    processor = without_videos("PixtralProcessor")(images, tokenizer, patch_size=8, chat_template=MISTRAL)
    config = LlavaConfig(
        vision_config=PixtralVisionConfig(**tower_settings(hidden_size=32, num_hidden_layers=2, image_size=64), head_dim=16),
        text_config=MistralConfig(**text_settings(tokenizer), head_dim=8),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_llava_with_pixtrals_tower_is_read_with_the_processor_that_its_folder_names(pixtral):
    vlm = load_vlm(pixtral)
    assert (vlm.family, type(vlm.processor).__name__) == ("llava", "PixtralProcessor")
    made = prepared(vlm, TWO)
    assert [tuple(region[:4]) for region in made.regions_R8] == [(0, 5, 5, 0), (1, 5, 8, 0)]
    assert tokens_of(made.regions_R8).sum() == (made.input_ids == vlm.image_token_id).sum()


@pytest.mark.slow
@torch.inference_mode()
def test_images_of_several_shapes_mix_in_a_batch_of_pixtrals(pixtral):
    vlm = load_vlm(pixtral)
    inputs = [prepared(vlm, ONE), prepared(vlm, TWO)]
    together = capture(vlm, batch_of(vlm, inputs))
    for sample, given in enumerate(inputs):
        alone = capture(vlm, batch_of(vlm, [given]))
        rows, columns = alone.attention[0].shape[2:]
        assert torch.allclose(together.attention[0][sample, :, :rows, :columns], alone.attention[0][0], atol=1e-6)


def test_pixtrals_processor_survives_saving(pixtral, tmp_path):
    vlm = load_vlm(pixtral)
    save_vlm(vlm, tmp_path)
    assert np.array_equal(prepared(load_vlm(tmp_path), TWO).images, prepared(vlm, TWO).images)


def test_a_class_token_among_the_vision_tokens_lies_nowhere(tmp_path):
    tokenizer = sentencepiece(["<image>"], pad="<pad>")
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
        chat_template=make_llava.TEMPLATE,
    ).save_pretrained(tmp_path)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tower_settings()),
        text_config=LlamaConfig(**text_settings(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full",
    )
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    first, grid = prepared(load_vlm(tmp_path), ONE).regions_R8
    assert tokens_of(np.stack([first, grid])).tolist() == [1, 16]
    assert first[4:].tolist() == [0, 0, 0, 0]


def test_an_older_llava_folder_has_its_patch_size_in_the_models_configuration(copied, written):
    path = copied / "processor_config.json"
    kept = {
        name: value for name, value in json.loads(path.read_text()).items() if name in ("image_processor", "processor_class")
    }
    path.write_text(json.dumps(kept))
    old, new = prepared(load_vlm(copied), ONE), prepared(load_vlm(written("llava")), ONE)
    assert np.array_equal(old.input_ids, new.input_ids)
    assert np.array_equal(old.images, new.images)


def test_settings_of_another_checkpoint_are_told_by_their_places_of_vision_tokens(copied):
    path = copied / "processor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "patch_size": 16}))
    vlm = load_vlm(copied)
    with pytest.raises(ValueError, match=r"model gives 16 vision tokens for 4 placeholders in the prompt.*patch_size"):
        vlm.encode_images(batch_of(vlm, [prepared(vlm, ONE)]))


def test_a_processor_that_does_not_tell_where_it_writes_images_is_refused(written, monkeypatch):
    vlm = load_vlm(written("llava"))
    processor = type(vlm.processor)
    original = processor.__call__

    def silent(self, *args, **kwargs):
        outputs = original(self, *args, **kwargs)
        outputs.pop("text_replacement_offsets")
        return outputs

    monkeypatch.setattr(processor, "__call__", silent)
    with pytest.raises(ValueError, match="does not say where in the text it puts vision tokens"):
        load_vlm(written("llava"))


def test_the_next_turns_opening_is_no_part_of_an_answer_that_was_closed_for_the_template(copied):
    (copied / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ '<s>USER: ' if m['role'] == 'user' else 'ASSISTANT: ' }}"
        "{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endfor %}"
    )
    vlm = load_vlm(copied)
    labels = prepared(vlm, TURNS).labels
    answers = vlm.tokenizer.decode(labels[labels != IGNORE]).split("</s>")
    assert [answer.strip() for answer in answers] == ["a dog", "red  or\ngreen", ""]


@pytest.mark.parametrize("name", ["smolvlm", "internvl", "minigpt4"])
def test_lora_updates_every_linear_layer_of_the_decoder_and_nothing_else(name, written, tmp_path):
    pytest.importorskip("peft")
    vlm = load_vlm(written(name))
    before = vlm.model.state_dict().keys()
    model = add_lora(vlm, LoraSettings(rank=2))
    updated = [module for module, _ in vlm.decoder.layers.named_modules() if module.endswith("lora_A")]
    assert len(updated) == 7 * vlm.layers
    assert not [module for module, _ in vlm.tower.named_modules() if "lora" in module]
    merge_lora(model, vlm, tmp_path)
    assert vlm.model.state_dict().keys() == before


def test_vision_tokens_that_are_all_alike_give_a_finite_loss():
    student_BVD, mask_BV = torch.ones(1, 3, 4), torch.ones(1, 3, dtype=torch.bool)
    loss = vision_loss(student_BVD, torch.zeros(1, 3, 4), mask_BV, mask_BV, relative_to_variance=True)
    assert loss.item() == 1.0
