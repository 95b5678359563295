"""Values of a checkpoint's JSON files that no model has are one CheckpointError, whichever library reads them."""

from __future__ import annotations

import json
import shutil

import make_minigpt4
import make_mobilevlm_v1
import pytest

from alignkd.errors import CheckpointError
from alignkd.models.config_files import check_sizes, integer, mapping, read_json
from alignkd.models.encoders.images import ImagePreprocessor
from alignkd.models.loading import load_vlm, save_vlm


@pytest.fixture(scope="module")
def folders(tmp_path_factory, written):
    """A checkpoint in each layout."""
    root = tmp_path_factory.mktemp("broken")
    make_mobilevlm_v1.write_official(root / "official")
    make_minigpt4.write_released(root / "released")
    own = {"own": written("mobilevlm_v1"), "minigpt4": written("minigpt4"), "llava": written("llava")}
    return {"official": root / "official", "released": root / "released", **own}


@pytest.fixture
def broken(folders, tmp_path):
    """A checkpoint with a value of one of its JSON files changed."""

    def change(layout, file, path, value):
        folder = shutil.copytree(folders[layout], tmp_path / "model")
        content = json.loads((folder / file).read_text())
        inner = content
        *outer, last = path.split(".")
        for name in outer:
            inner = inner[name]
        inner[last] = value
        (folder / file).write_text(json.dumps(content))
        return folder

    return change


LARGE = 10**12
CASES = [
    *[("official", "config.json", "hidden_size", value) for value in ("x", [32], {}, -32, 0, 1.5, LARGE)],
    *[("official", "config.json", "num_hidden_layers", value) for value in ("x", -1, LARGE)],
    *[("official", "config.json", "num_attention_heads", value) for value in (0, "x", [4])],
    *[("official", "config.json", "rope_scaling", value) for value in ([1], "x", {"type": "nothing"}, {"type": 3})],
    *[("official", "config.json", "mm_vision_select_layer", value) for value in ("x", [-2], None, LARGE, -7)],
    *[("official", "config.json", "mm_vision_tower", value) for value in ([1], {"a": 1}, 3)],
    *[("official", "config.json", "mm_projector_type", value) for value in ([1], {"a": 1}, 3)],
    *[("official", "clip/config.json", "hidden_size", value) for value in ("x", [16], -16, 0, LARGE)],
    *[("official", "clip/config.json", "patch_size", value) for value in ("x", -8, 0, {})],
    *[("official", "clip/config.json", "image_size", value) for value in ("x", -64, LARGE)],
    *[("official", "clip/config.json", "hidden_act", value) for value in (3, "nothing", [])],
    *[("official", "clip/config.json", "vision_config", value) for value in (3, [1], "x")],
    *[("official", "clip/preprocessor_config.json", "size", value) for value in ("x", [1], -1, 0, {"a": 3}, LARGE)],
    *[("official", "clip/preprocessor_config.json", "crop_size", value) for value in ({"height": -1, "width": 3}, LARGE, "x")],
    *[("official", "clip/preprocessor_config.json", "image_mean", value) for value in ("x", [1, 2], {}, ["a", "b", "c"])],
    *[("own", "config.json", "projector_grid", value) for value in ("x", [4], -1, LARGE)],
    *[("own", "config.json", "vision_feature_layer", value) for value in ("x", [-2, -1], 40)],
    *[("own", "config.json", "text_config", value) for value in ("x", [1], 3)],
    *[("own", "config.json", "vision_config.num_hidden_layers", value) for value in ("x", LARGE, -1)],
    *[("released", "config.json", "vision_config", value) for value in ("x", [1], None, {"hidden_size": "x"})],
    *[("released", "config.json", "qformer_config", value) for value in ("x", [1], {"num_attention_heads": 0})],
    *[("released", "config.json", "num_query_tokens", value) for value in ("x", [4], None, 0, -4, LARGE)],
    *[("released", "vicuna/config.json", "intermediate_size", value) for value in ("x", [1], -1, LARGE)],
    *[("minigpt4", "config.json", "qformer_config", value) for value in ("x", [1])],
    *[("llava", "config.json", "vision_config", value) for value in ("x", [1], 3)],
    *[("llava", "config.json", "text_config.num_hidden_layers", value) for value in (0, "x", LARGE)],
    *[("llava", "config.json", "image_token_index", value) for value in ("x", [1], None)],
    *[("llava", "processor_config.json", "patch_size", value) for value in ("x", [1], 0)],
    *[("llava", "processor_config.json", "image_processor", value) for value in ("x", [1], 3)],
    *[("llava", "processor_config.json", "image_processor.size", value) for value in ("x", {"shortest_edge": LARGE}, -1)],
    *[(layout, "config.json", "model_type", value) for layout in ("own", "llava") for value in (3, [1], {}, "nothing")],
]


@pytest.mark.parametrize(("layout", "file", "path", "value"), CASES, ids=lambda value: str(value)[:24])
def test_a_broken_value_is_one_message(broken, layout, file, path, value):
    with pytest.raises(CheckpointError) as raised:
        load_vlm(broken(layout, file, path, value))
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("text", ["{", "[]", "3", '"x"', "null", "[" * 100_000, '{"a": "\ud800"', "\0"])
def test_what_is_no_json_object_is_one_message(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_json(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_vlm(tmp_path)


@pytest.mark.parametrize("value", ["x", None, [], {}, 0, 11, float("nan"), float("inf"), "1" * 5000])
def test_a_number_out_of_its_range_is_named_with_the_range(value):
    with pytest.raises(CheckpointError, match=r"file: n is .*, expected a whole number from 1 to 10") as raised:
        integer({"n": value}, "n", "file", 5, 1, 10)
    assert len(str(raised.value)) < 200


def test_numbers_and_objects_that_are_left_out_have_their_defaults():
    assert integer({}, "n", "file", 5, 1, 10) == 5
    assert integer({"n": "7"}, "n", "file", 5, 1, 10) == 7
    assert mapping({}, "o", "file") == {}
    with pytest.raises(CheckpointError, match="file: o is 3, expected an object"):
        mapping({"o": 3}, "o", "file")


def test_sizes_are_checked_in_configurations_inside_of_configurations():
    check_sizes({"text_config": {"num_hidden_layers": 80}, "depth": None}, "file")
    with pytest.raises(CheckpointError, match="file: num_hidden_layers is 5000, expected 0 to 1,024"):
        check_sizes({"text_config": {"num_hidden_layers": 5000}}, "file")


@pytest.mark.parametrize("settings", [{"size": {"shortest_edge": 2**20}}, {"image_mean": "x"}, {"resample": 99}, {"size": []}])
def test_image_settings_that_cannot_be_used_are_refused_when_they_are_read(settings):
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        ImagePreprocessor(settings, "pad")


def test_a_family_without_an_official_layout_refuses_to_write_one(written, tmp_path):
    vlm = load_vlm(written("llava"))
    assert not vlm.has_official_layout
    with pytest.raises(CheckpointError, match=r"the family llava .* has no official layout"):
        save_vlm(vlm, tmp_path, official=True)


def test_a_family_without_tower_features_says_so(written):
    vlm = load_vlm(written("llava"))
    assert not vlm.caches_tower
    with pytest.raises(NotImplementedError, match="family llava has no tower features"):
        vlm.run_tower(None)
    with pytest.raises(NotImplementedError, match="family llava has no tower features"):
        _ = vlm.tower_feature_shape
