"""A model is what its configuration says: weights, numbers and files that do not fit are refused; no code of a folder runs."""

from __future__ import annotations

import ast
import json
import os
import shutil
import zipfile
from pathlib import Path

import make_mobilevlm_v1
import pytest
import torch
from safetensors.torch import load_file, save_file

import alignkd
from alignkd.errors import CheckpointError, ConfigError
from alignkd.models.checkpoints.state_files import LIMIT_VARIABLE, max_checkpoint_bytes, read_state
from alignkd.models.checkpoints.tokenizer_files import load_tokenizer
from alignkd.models.config_files import check_feature_layers, check_sizes
from alignkd.models.encoders.processors import load_processor
from alignkd.models.loading import load_vlm

STRICT = ["llava", "qwen2_5_vl", "instructblip", "vipllava", "mobilevlm_v1", "minigpt4"]


@pytest.fixture
def copied(written, tmp_path):
    """A family's folder to spoil."""
    return lambda name: shutil.copytree(written(name), tmp_path / name)


def change_weights(folder, change):
    path = folder / "model.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(state)
    save_file(state, path, {"format": "pt"})


def projector_of(state):
    return next(name for name in state if any(word in name for word in ("projector", "projection.", "merger")))


@pytest.mark.parametrize("name", STRICT)
def test_a_weight_that_is_no_part_of_the_model_is_refused_by_name(name, copied):
    folder = copied(name)
    change_weights(folder, lambda state: state.update({"model.language_model.layers.9.extra.weight": torch.ones(3)}))
    with pytest.raises(CheckpointError, match=r"layers\.9\.extra\.weight"):
        load_vlm(folder)


@pytest.mark.parametrize("name", STRICT)
def test_a_weight_that_is_missing_is_refused_by_name(name, copied):
    folder, gone = copied(name), []

    def change(state):
        gone.append(projector_of(state))
        del state[gone[0]]

    change_weights(folder, change)
    with pytest.raises(CheckpointError, match=gone[0].rsplit(".", 2)[-2]):
        load_vlm(folder)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "mobilevlm_v1", "minigpt4"])
def test_a_weight_of_another_kind_of_number_is_refused_by_name(name, dtype, copied):
    folder = copied(name)
    change_weights(folder, lambda state: state.update({(key := projector_of(state)): state[key].to(dtype)}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors holds .*expected dense tensors of real numbers"):
        load_vlm(folder)


@pytest.mark.parametrize("name", ["llava", "instructblip"])
def test_buffers_that_older_releases_stored_are_passed_over(name, copied, written):
    folder = copied(name)
    old = {
        "model.vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None],
        "model.language_model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    change_weights(folder, lambda state: state.update(old))
    assert load_vlm(folder).weights_fingerprint() == load_vlm(written(name)).weights_fingerprint()


def sparse():
    return torch.eye(3).to_sparse()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (sparse, "sparse_coo"),
        (lambda: torch.ones(3, device="meta"), "meta device"),
        (lambda: torch.ones(1).expand(1 << 40), "bytes made of 4"),
        (lambda: torch.ones(3, dtype=torch.int32), "int32"),
        (lambda: torch.ones(3, dtype=torch.complex64), "complex64"),
    ],
)
def test_a_pickle_of_anything_but_dense_real_tensors_is_refused_before_it_takes_memory(make, said, tmp_path):
    torch.save({"weight": make()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=rf"pytorch_model\.bin.*({said}|cannot be read)"):
        read_state(tmp_path)


def test_a_compressed_archive_is_not_read(tmp_path):
    plain, packed = tmp_path / "plain.bin", tmp_path / "pytorch_model.bin"
    torch.save({"weight": torch.zeros(1 << 20)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for part in source.infolist():
            target.writestr(part.filename, source.read(part))
    assert packed.stat().st_size < 1 << 16
    with pytest.raises(CheckpointError, match="compressed archive"):
        read_state(tmp_path)


def test_weights_beyond_the_limit_are_refused_and_the_limit_can_be_raised(written, monkeypatch):
    monkeypatch.setenv(LIMIT_VARIABLE, "0.00001")
    for name in ("llava", "mobilevlm_v1"):
        with pytest.raises(CheckpointError, match=f"bytes in memory, more than 10,737; .* set {LIMIT_VARIABLE}=1"):
            load_vlm(written(name))
    monkeypatch.setenv(LIMIT_VARIABLE, "1")
    load_vlm(written("llava"))
    for text in ("x", "-1", "0", "nan", "inf"):
        with pytest.raises(ConfigError, match=LIMIT_VARIABLE):
            max_checkpoint_bytes({LIMIT_VARIABLE: text})


def test_an_index_of_a_family_of_transformers_that_names_a_file_elsewhere_is_refused(copied):
    folder = copied("llava")
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    names = dict.fromkeys(load_file(folder.parent / "outside.safetensors"), "../outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        load_vlm(folder)


@pytest.mark.parametrize("name", ["llava", "mobilevlm_v1"])
def test_a_named_pipe_among_the_files_is_refused_by_name(name, copied):
    folder = copied(name)
    os.mkfifo(folder / "special_tokens_map.json")
    with pytest.raises(CheckpointError, match=r"special_tokens_map\.json is a named pipe, .* expected a plain file"):
        load_vlm(folder)


# Numbers of configurations


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("num_attention_heads", value) for value in (0, -1, 5000)],
        *[("num_key_value_heads", value) for value in (0, 10**9)],
        *[("head_dim", value) for value in (0, -8, 10**6)],
        *[("hidden_size", value) for value in (-1, 2**21)],
        *[("vocab_size", value) for value in (-1, 2**30)],
        *[("patch_size", value) for value in (0, [8, 0], -4)],
        *[("image_size", value) for value in ([32, 10**6], 0)],
        *[("pad_token_id", value) for value in (-2, 10, 10**9)],
        *[("rms_norm_eps", value) for value in (0, -1e-6, float("nan"), float("inf"))],
        *[("rope_theta", value) for value in (0.0, float("inf"))],
    ],
)
def test_a_number_that_no_model_has_is_named_with_its_range(name, value):
    config = {"text_config": {"vocab_size": 10, name: value}}
    with pytest.raises(CheckpointError, match=f"config: {name} is .*, expected"):
        check_sizes(config, "config")


def test_numbers_that_models_have_pass():
    check_sizes({"vocab_size": 10, "pad_token_id": -1, "num_key_value_heads": None, "patch_size": [14, 14]}, "config")
    check_sizes({"time_step_limit": [0.0, float("inf")], "use_cache": True, "pad_token_id": 9, "vocab_size": 10}, "config")


@pytest.mark.parametrize("value", [4, -5, 10**12, [-2, 7], "x", [None], 1.5, True])
def test_a_feature_layer_that_the_tower_does_not_have_is_refused(value):
    for name in ("vision_feature_layer", "vision_feature_layers"):
        with pytest.raises(CheckpointError, match=f"config: {name} is"):
            check_feature_layers({"vision_config": {"num_hidden_layers": 3}, name: value}, "config")


@pytest.mark.parametrize(("name", "setting"), [("llava", "vision_feature_layer"), ("vipllava", "vision_feature_layer")])
def test_a_folder_with_such_a_feature_layer_is_refused_and_others_are_read(name, setting, copied):
    folder = copied(name)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    whole = isinstance(config.get(setting), list)
    for value in (-4, 3):
        path.write_text(json.dumps({**config, setting: [value, value] if whole else value}))
        load_vlm(folder)
    for value in (-5, 4):
        path.write_text(json.dumps({**config, setting: [value] if whole else value}))
        with pytest.raises(CheckpointError, match=f"{setting} is .* the vision tower has 3 layers: expected -4 to 3"):
            load_vlm(folder)


# Code of a folder


def test_every_call_that_reads_a_checkpoint_forbids_its_code():
    root = Path(alignkd.__file__).parent
    calls = [
        (path.name, call)
        for path in root.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "from_pretrained"
    ]
    assert len(calls) >= 8
    for name, call in calls:
        text = ast.unparse(call)
        assert "trust_remote_code=False" in text or "'trust_remote_code': False" in text, (name, text)


@pytest.fixture
def evil(tmp_path):
    """Makes a folder's file name code that writes ``OWNED`` when it is loaded."""

    def spoil(folder, file, settings):
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'OWNED')!r}, 'w')\nclass Evil: pass\n")
        path = folder / file
        path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), **settings}))
        return folder

    yield spoil
    assert not (tmp_path / "OWNED").exists()


@pytest.fixture(autouse=True)
def nobody_answers(monkeypatch):
    """A question to the user is an error."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))


def test_a_tokenizer_that_names_code_is_refused_without_a_question(evil, tmp_path):
    make_mobilevlm_v1.write_official(tmp_path / "model")
    folder = tmp_path / "model"
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (folder / "tokenizer.json").write_text("{}")
    evil(folder, "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"})
    with pytest.raises(CheckpointError, match=r"code of their own \(auto_map\), which alignkd never runs"):
        load_tokenizer(folder)
    with pytest.raises(CheckpointError):
        load_vlm(folder)


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("config.json", {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForImageTextToText": "evil.Evil"}}),
        ("config.json", {"auto_map": {"AutoConfig": "evil.Evil"}, "model_type": "evil"}),
        ("processor_config.json", {"auto_map": {"AutoProcessor": "evil.Evil"}, "processor_class": "Evil"}),
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "evil.Evil"}, "image_processor_type": "Evil"}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}),
    ],
)
def test_no_file_of_a_family_of_transformers_runs_code_or_asks(file, settings, evil, copied):
    folder = evil(copied("llava"), file, settings)
    try:
        load_vlm(folder)
    except CheckpointError as error:
        assert len(str(error)) < 1000  # noqa: PT017  either is right: refused, or read without its code


# Processors


@pytest.mark.parametrize("kind", ["video_llava", "llava_next_video"])
def test_a_processor_whose_video_half_comes_first_gets_its_parts_by_name(kind, copied):
    folder = copied("llava")
    classes = {"video_llava": "VideoLlavaProcessor", "llava_next_video": "LlavaNextVideoProcessor"}
    path = folder / "processor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "processor_class": classes[kind]}))
    processor = load_processor(folder, kind)
    assert hasattr(processor.tokenizer, "encode")
    assert hasattr(processor.image_processor, "preprocess")


def test_a_processor_that_wants_torchvision_is_told_so(copied):
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        pytest.skip("torchvision is there")
    folder = copied("llava")
    path = folder / "processor_config.json"
    settings = json.loads(path.read_text())
    settings["image_processor"]["image_processor_type"] = "Llama4ImageProcessor"
    path.write_text(json.dumps({**settings, "processor_class": "Llama4Processor"}))
    with pytest.raises(CheckpointError, match=r"reads images with torchvision alone, which is not installed") as raised:
        load_processor(folder, "llama4")
    assert "tokenizer" not in str(raised.value)


def test_files_that_are_there_are_not_blamed(copied):
    folder = copied("llava")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read") as raised:
        load_processor(folder, "llava")
    assert "lacks" not in str(raised.value)


def test_a_processor_for_videos_alone_is_told_so(copied):
    folder = copied("llava")
    path = folder / "processor_config.json"
    path.write_text(json.dumps({"processor_class": "InstructBlipVideoProcessor"}))
    with pytest.raises(CheckpointError, match="takes no images, videos alone"):
        load_processor(folder, "instructblipvideo")
