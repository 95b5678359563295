"""Checkpoints in and out: the official layout in all its forms, other shapes, and what transformers makes of ours."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import (
    GOLDEN,
    IMAGE,
    MODEL,
    TOWER,
    TOWER_PREFIX,
    batch_of,
    change_config,
    mixture,
    reference,
    sample,
    write_checkpoint,
)

from alignkd.capture.attention import capture
from alignkd.models.checkpoints.clip_tower import CLIP_L_336, find_tower, image_settings, tower_config
from alignkd.models.encoders.images import ImagePreprocessor
from alignkd.models.loading import load_vlm, save_vlm


def outputs(vlm, seed=0):
    batch = batch_of(vlm, [sample(vlm, [1, 5, IMAGE, 7, 8, 9, 10], seed=seed), sample(vlm, [1, 11, 12, 13], answers=2)])
    with torch.no_grad():
        captured = capture(vlm, batch)
        return captured.attention[0], captured.vision_BVD, vlm.model.lm_head(captured.hidden_AD)


def assert_same_model(one, other):
    assert one.weights_fingerprint() == other.weights_fingerprint()
    assert one.tokenizer_fingerprint() == other.tokenizer_fingerprint()
    assert one.images.fingerprint() == other.images.fingerprint()
    for a, b in zip(outputs(one), outputs(other), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def assert_matches_restatement(vlm, state, config, tower):
    for one in mixture(vlm)[1:5:3] + mixture(vlm)[2:3]:  # one image, two apart, none
        expected = reference(state, config, tower, one.input_ids, one.images)
        batch = batch_of(vlm, [one])
        with torch.no_grad():
            captured = capture(vlm, batch)
            logits = vlm.model.lm_head(captured.hidden_AD)
        attention = expected.attention[:, batch.text_rows_BT[0]][:, :, batch.vision_columns_BV[0]]
        torch.testing.assert_close(captured.attention[0][0], attention, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            captured.vision_BVD[0], expected.vision.flatten(0, 1)[: batch.vision_columns_BV.shape[1]], rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(logits, expected.logits[batch.answer_positions_A], rtol=1e-4, atol=1e-4)


# --- saving and loading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("official", [True, False], ids=["official", "hugging-face"])
@pytest.mark.parametrize("name", ["teacher", "student"])
def test_a_saved_model_loads_as_the_same_model(golden_models, tmp_path, official, name):
    save_vlm(golden_models[name], tmp_path / "saved", official=official)
    assert_same_model(golden_models[name], load_vlm(tmp_path / "saved"))


def test_layouts_can_be_changed_back_and_forth_without_loss(tiny_folder, tmp_path):
    first = load_vlm(tiny_folder)
    save_vlm(first, tmp_path / "a", official=False)
    save_vlm(load_vlm(tmp_path / "a"), tmp_path / "b", official=True)
    save_vlm(load_vlm(tmp_path / "b"), tmp_path / "c", official=False)
    assert_same_model(first, load_vlm(tmp_path / "b"))
    assert_same_model(first, load_vlm(tmp_path / "c"))


@pytest.mark.parametrize("official", [True, False], ids=["official", "hugging-face"])
def test_preprocessing_keeps_its_fingerprint_where_the_checkpoint_had_no_preprocessor_file(tmp_path, official):
    # As the official folders have none: their saved students must still fit a cache made with the same preprocessing.
    write_checkpoint(tmp_path / "model")
    (tmp_path / "model" / "clip" / "preprocessor_config.json").unlink()
    vlm = load_vlm(tmp_path / "model")
    save_vlm(vlm, tmp_path / "saved", official=official)
    again = load_vlm(tmp_path / "saved")
    from PIL import Image

    picture = Image.effect_noise((31, 20), 80).convert("RGB")
    torch.testing.assert_close(again.images(picture), vlm.images(picture), rtol=0, atol=0)
    assert again.images.fingerprint() == vlm.images.fingerprint()


def test_unknown_keys_of_an_official_configuration_are_kept(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "in")
    change_config(tmp_path / "in", tune_mm_mlp_adapter=False, mm_use_im_start_end=False)
    save_vlm(load_vlm(tmp_path / "in"), tmp_path / "out", official=True)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["tune_mm_mlp_adapter"] is False
    assert written["mm_use_im_start_end"] is False
    assert {k: written[k] for k in ("model_type", "mm_projector_type", "num_key_value_heads", "rope_theta")} == {
        "model_type": "mobilevlm",
        "mm_projector_type": "ldpnetv2",
        "num_key_value_heads": 2,
        "rope_theta": 10000.0,
    }


def test_the_saved_official_weights_carry_the_official_names(tiny_folder, tmp_path):
    from safetensors.torch import load_file

    state = torch.load(tiny_folder / "pytorch_model.bin", weights_only=True)
    save_vlm(load_vlm(tiny_folder), tmp_path / "saved", official=True)
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert set(saved) == set(state)
    for name, tensor in state.items():
        assert torch.equal(saved[name], tensor), name


@pytest.mark.slow
def test_saving_over_the_folder_a_model_came_from_keeps_it_whole(tiny_folder, tmp_path):
    # In a process of its own: weights mapped from a file that is overwritten could end it.
    code = (
        "import sys; from alignkd.models.loading import load_vlm, save_vlm\n"
        "for folder, official in ((sys.argv[1], True), (sys.argv[2], False)):\n"
        "    vlm = load_vlm(folder); before = vlm.weights_fingerprint(); save_vlm(vlm, folder, official=official)\n"
        "    assert vlm.weights_fingerprint() == before; assert load_vlm(folder).weights_fingerprint() == before\n"
    )
    folders = [tmp_path / "official", tmp_path / "ours"]
    for folder in folders:
        save_vlm(load_vlm(tiny_folder), folder, official=folder.name == "official")
    subprocess.run([sys.executable, "-c", code, *folders], check=True, capture_output=True)


def test_a_checkpoint_loads_in_the_dtype_asked_for(tiny_folder, tmp_path):
    vlm = load_vlm(tiny_folder, dtype=torch.bfloat16)
    assert {p.dtype for p in vlm.model.parameters()} == {torch.bfloat16}
    save_vlm(vlm, tmp_path / "half", official=True)
    assert vlm.weights_fingerprint() == load_vlm(tmp_path / "half", dtype=torch.bfloat16).weights_fingerprint()
    assert vlm.weights_fingerprint() != load_vlm(tiny_folder).weights_fingerprint()
    assert all(o.isfinite().all() for o in outputs(vlm))


def test_a_changed_weight_changes_the_fingerprint(tiny):
    before = tiny.weights_fingerprint()
    with torch.no_grad():
        tiny.model.lm_head.weight[3, 3] += 1e-6
    assert tiny.weights_fingerprint() != before


# --- the files the weights may lie in ----------------------------------------------------------------------------------


@pytest.fixture
def golden_copy(tmp_path):
    """The golden student, to be rearranged."""
    shutil.copytree(GOLDEN / "student", tmp_path / "student")
    shutil.copytree(GOLDEN / "clip", tmp_path / "clip")
    return tmp_path / "student"


def take_state(folder):
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    (folder / "pytorch_model.bin").unlink()
    return state


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_shards_with_an_index_load_as_one_file_does(golden_models, golden_copy, suffix):
    state = take_state(golden_copy)
    stem = "pytorch_model" if suffix == "bin" else "model"
    shards = [f"{stem}-{i:05d}-of-00003.{suffix}" for i in (1, 2, 3)]
    where = {name: shards[i % 3] for i, name in enumerate(state)}
    for shard in shards:
        part = {k: v for k, v in state.items() if where[k] == shard}
        if suffix == "bin":
            torch.save(part, golden_copy / shard)
        else:
            save_file(part, golden_copy / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (golden_copy / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    assert_same_model(golden_models["student"], load_vlm(golden_copy))


def test_one_safetensors_file_loads_as_the_bin_file_does(golden_models, golden_copy):
    save_file(take_state(golden_copy), golden_copy / "model.safetensors")
    assert_same_model(golden_models["student"], load_vlm(golden_copy))


def test_a_bin_file_older_than_the_zip_format_loads(golden_models, golden_copy):
    torch.save(take_state(golden_copy), golden_copy / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_same_model(golden_models["student"], load_vlm(golden_copy))


def test_buffers_that_old_checkpoints_hold_are_ignored(golden_models, golden_copy):
    state = take_state(golden_copy)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    state[f"{TOWER_PREFIX}embeddings.position_ids"] = torch.arange(577)[None]
    torch.save(state, golden_copy / "pytorch_model.bin")
    assert_same_model(golden_models["student"], load_vlm(golden_copy))


def test_tower_weights_come_from_the_clip_folder_where_the_checkpoint_has_none(golden_models, golden_copy):
    state = take_state(golden_copy)
    torch.save({k: v for k, v in state.items() if not k.startswith(TOWER_PREFIX)}, golden_copy / "pytorch_model.bin")
    assert_same_model(golden_models["student"], load_vlm(golden_copy))


def test_a_whole_clip_model_serves_as_the_tower(golden_models, golden_copy):
    state = take_state(golden_copy)
    torch.save({k: v for k, v in state.items() if not k.startswith(TOWER_PREFIX)}, golden_copy / "pytorch_model.bin")
    clip = golden_copy.parent / "clip"
    vision = json.loads((clip / "config.json").read_text())
    text = {"hidden_size": 8, "num_hidden_layers": 1}
    (clip / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision, "text_config": text}))
    weights = take_state(clip) | {
        "text_model.embeddings.token_embedding.weight": torch.zeros(9, 8),
        "text_projection.weight": torch.zeros(4, 8),
        "visual_projection.weight": torch.zeros(4, 32),
        "logit_scale": torch.tensor(2.0),
        "vision_model.embeddings.position_ids": torch.arange(577)[None],
    }
    torch.save(weights, clip / "pytorch_model.bin")
    assert_same_model(golden_models["student"], load_vlm(golden_copy))


def test_the_vision_tower_can_be_named_by_hand(golden_models, golden_copy, tmp_path):
    (tmp_path / "clip").rename(tmp_path / "elsewhere")
    state = take_state(golden_copy)
    torch.save({k: v for k, v in state.items() if not k.startswith(TOWER_PREFIX)}, golden_copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match="--vision-tower"):
        load_vlm(golden_copy)
    assert_same_model(golden_models["student"], load_vlm(golden_copy, vision_tower=tmp_path / "elsewhere"))
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_vlm(golden_copy, vision_tower=tmp_path / "nowhere")


def test_the_official_tower_needs_no_folder_and_no_network(tmp_path):
    (tmp_path / "model").mkdir()
    assert find_tower(CLIP_L_336, tmp_path / "model", None) is None
    config = tower_config(CLIP_L_336, None)
    assert (config.hidden_size, config.num_hidden_layers, config.image_size, config.patch_size) == (1024, 24, 336, 14)
    assert config.hidden_act == "quick_gelu"
    images = ImagePreprocessor(image_settings(tmp_path / "model", None, config.image_size), "pad")
    from PIL import Image

    assert images(Image.new("RGB", (40, 20), (122, 116, 104))).shape == (3, 336, 336)
    (tmp_path / "clip-vit-large-patch14-336").mkdir()
    (tmp_path / "clip-vit-large-patch14-336" / "config.json").write_text("{}")
    assert find_tower(CLIP_L_336, tmp_path / "model", None) == tmp_path / "clip-vit-large-patch14-336"


# --- other shapes ------------------------------------------------------------------------------------------------------


def test_the_restatement_in_these_tests_gives_the_golden_values():
    state = torch.load(GOLDEN / "student" / "pytorch_model.bin", weights_only=True)
    config = json.loads((GOLDEN / "student" / "config.json").read_text())
    tower = json.loads((GOLDEN / "clip" / "config.json").read_text())
    values = np.load(GOLDEN / "golden.npz")
    ids = values["v1/cap0/input_ids"]
    found = reference(state, config, tower, ids, torch.from_numpy(values["pixel_values/cap0"])[None])
    start = int(np.flatnonzero(ids == IMAGE)[0])
    attention = found.attention[:, start + 144 :, start : start + 144]
    np.testing.assert_allclose(attention, values["v1/cap0/student/attention_text_to_vision"], atol=1e-5)
    np.testing.assert_allclose(found.vision[0], values["v1/cap0/student/vision_tokens"], atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "tower"),
    [
        pytest.param({}, {}, id="plain"),
        pytest.param({"num_hidden_layers": 1}, {}, id="one layer"),
        pytest.param({"num_hidden_layers": 5}, {"num_hidden_layers": 2}, id="deeper decoder, shallower tower"),
        pytest.param({"rms_norm_eps": 0.1}, {"layer_norm_eps": 0.05}, id="norms"),
        pytest.param({"rope_theta": 50.0}, {}, id="rope_theta"),
        pytest.param({"num_attention_heads": 2, "num_key_value_heads": 2}, {"num_attention_heads": 8}, id="heads"),
        pytest.param({"num_attention_heads": 6, "num_key_value_heads": 2}, {}, id="grouped key/value heads"),
        pytest.param({"num_attention_heads": 4, "num_key_value_heads": 1}, {}, id="one key/value head"),
        pytest.param({"mm_projector_grid": 3}, {"image_size": 35, "patch_size": 5}, id="image and patch"),
        pytest.param({"mm_projector_grid": 5}, {"image_size": 24, "patch_size": 8}, id="grid wider than the patches"),
        pytest.param({"mm_vision_select_layer": -1}, {}, id="last tower layer"),
        pytest.param({"mm_vision_select_layer": -3}, {}, id="third last tower layer"),
        pytest.param({"mm_vision_select_layer": 1}, {}, id="first tower layer"),
        pytest.param({"tie_word_embeddings": True}, {}, id="tied embeddings"),
        pytest.param({"hidden_size": 32, "intermediate_size": 20}, {"hidden_size": 24, "intermediate_size": 10}, id="widths"),
    ],
)
def test_any_shape_gives_the_values_of_the_restatement_and_survives_saving(tmp_path, changes, tower):
    state = write_checkpoint(tmp_path / "model", tower=tower, **changes)
    vlm = load_vlm(tmp_path / "model")
    assert_matches_restatement(vlm, state, {**MODEL, **changes}, {**TOWER, **tower})
    for official in (True, False):
        save_vlm(vlm, tmp_path / str(official), official=official)
        assert_same_model(vlm, load_vlm(tmp_path / str(official)))


def test_twelve_by_twelve_vision_tokens_where_the_configuration_names_no_grid(tmp_path):
    state = write_checkpoint(tmp_path / "model")
    change_config(tmp_path / "model", mm_projector_grid=...)
    vlm = load_vlm(tmp_path / "model")
    assert vlm.vision_tokens_per_image == 144
    config = {k: v for k, v in MODEL.items() if k != "mm_projector_grid"}
    assert_matches_restatement(vlm, state, config, TOWER)


@pytest.mark.parametrize("value", [..., None], ids=["absent", "null"])
def test_key_value_heads_and_rope_theta_may_be_left_out_as_in_old_configurations(tmp_path, value):
    state = write_checkpoint(tmp_path / "model")
    change_config(tmp_path / "model", num_key_value_heads=value, rope_theta=...)
    assert_matches_restatement(load_vlm(tmp_path / "model"), state, MODEL, TOWER)


@pytest.mark.parametrize("official", [True, False], ids=["official", "hugging-face"])
def test_tied_embeddings_stay_tied(tmp_path, official):
    write_checkpoint(tmp_path / "model", tie_word_embeddings=True)
    vlm = load_vlm(tmp_path / "model")
    save_vlm(vlm, tmp_path / "saved", official=official)
    for model in (vlm.model, load_vlm(tmp_path / "saved").model):
        assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


@pytest.mark.parametrize("official", [True, False], ids=["official", "hugging-face"])
@pytest.mark.parametrize(
    "scaling", [{"type": "linear", "factor": 4.0}, {"rope_type": "dynamic", "factor": 2.0}], ids=["linear", "dynamic"]
)
def test_rope_scaling_survives_every_change_of_layout(tmp_path, official, scaling):
    write_checkpoint(tmp_path / "model", rope_scaling=scaling)
    vlm = load_vlm(tmp_path / "model")
    save_vlm(vlm, tmp_path / "ours", official=False)
    save_vlm(load_vlm(tmp_path / "ours"), tmp_path / "saved", official=official)
    assert_same_model(vlm, load_vlm(tmp_path / "saved"))


def test_features_with_the_class_token_are_refused_where_they_are_no_square(tmp_path):
    write_checkpoint(tmp_path / "model", mm_vision_select_feature="cls_patch")
    with pytest.raises(ValueError, match=r"cls_patch|square"):
        outputs(load_vlm(tmp_path / "model"))


def test_an_unknown_select_feature_is_refused(tmp_path):
    write_checkpoint(tmp_path / "model", mm_vision_select_feature="everything")
    with pytest.raises(ValueError, match="mm_vision_select_feature is 'everything'"):
        load_vlm(tmp_path / "model")
