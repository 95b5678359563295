"""Models that cannot be aligned, and folders that lack something, are refused by name before any data is read."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from tiny_parts import text_settings, tower_settings
from transformers import AutoModelForImageTextToText, Lfm2Config, Lfm2VlConfig, Siglip2VisionConfig

from alignkd.models.loading import load_vlm
from alignkd.models.registry import REFUSED, family_class, family_records
from alignkd.models.transformers_vlm import TransformersVlm
from alignkd.models.vlm import Vlm


@pytest.fixture
def copied(written, tmp_path):
    """A LLaVA folder to spoil."""
    return shutil.copytree(written("llava"), tmp_path / "model")


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_do_not_fit_are_refused_by_their_type_with_the_reason(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ValueError, match=rf"model_type '{kind}' is not supported: \w+"):
        load_vlm(tmp_path)


def test_no_family_is_both_known_and_refused_and_every_class_is_there():
    types = [model_type for record in family_records() for model_type in record.model_types]
    assert len(types) == len(set(types))
    assert not set(types) & REFUSED.keys()
    assert all(issubclass(family_class(record), Vlm) for record in family_records())


def test_a_model_type_that_nobody_knows_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="'llama', which is no vision-language model known here"):
        load_vlm(tmp_path)


def test_a_first_layer_without_self_attention_is_refused(written, tmp_path):
    vlm = load_vlm(written("llava"))
    text = text_settings(vlm.tokenizer, layer_types=["conv", "full_attention"])
    config = Lfm2VlConfig(
        vision_config=Siglip2VisionConfig(**tower_settings(num_patches=16)), text_config=Lfm2Config(**text), image_token_id=5
    )
    model = AutoModelForImageTextToText.from_config(config)
    with pytest.raises(ValueError, match="type 'lfm2_vl' lacks self-attention in its first layer: it is not supported"):
        TransformersVlm(model, vlm.tokenizer, tmp_path, vlm.processor).check()


def test_a_model_without_tower_and_projector_under_usual_names_is_refused(written):
    vlm = load_vlm(written("llava"))
    for name in ("vision_tower", "multi_modal_projector"):
        delattr(vlm.model.model, name)
    with pytest.raises(
        ValueError, match=r"'llava' lacks a vision tower by one of the names .*, a projector by one of the names"
    ):
        vlm.check()


def test_a_folder_without_a_chat_template_is_told_what_it_lacks(copied):
    (copied / "chat_template.jinja").unlink()
    vlm = load_vlm(copied)
    with pytest.raises(ValueError, match=r"model has no chat template.*expected chat_template\.jinja.*--template v1"):
        vlm.encoder("chat", 512)


def test_a_chat_template_among_the_tokenizers_settings_is_found(copied, written):
    template = (copied / "chat_template.jinja").read_text()
    (copied / "chat_template.jinja").unlink()
    path = copied / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    assert load_vlm(copied).processor.chat_template == load_vlm(written("llava")).processor.chat_template


def test_a_chat_template_that_shows_no_images_is_refused(copied):
    (copied / "chat_template.jinja").write_text(
        "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="prompts of this model cannot be made"):
        load_vlm(copied)


def test_a_folder_without_preprocessing_is_told_what_it_needs(copied):
    for name in ("processor_config.json", "preprocessor_config.json"):
        (copied / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"its processor \(LlavaProcessor\) cannot be read.*preprocessor_config\.json"):
        load_vlm(copied)


def test_weights_that_are_missing_are_named(copied):
    state = load_file(copied / "model.safetensors")
    gone = next(name for name in state if "multi_modal_projector" in name)
    save_file({name: tensor for name, tensor in state.items() if name != gone}, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing keys: .*multi_modal_projector"):
        load_vlm(copied)
