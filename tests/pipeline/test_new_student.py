"""A student of a language model, a tower and a new projector: it loads, learns, and has the weights of its parts."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from tiny_runs import GOLDEN, STUDENT, train

from alignkd.cli import UserError, main
from alignkd.models.loading import load_vlm

CLIP = GOLDEN / "clip"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The language model of a golden student, by itself."""
    folder = tmp_path_factory.mktemp("parts") / "llama"
    shutil.copytree(STUDENT, folder)
    config = json.loads((folder / "config.json").read_text())
    text = {name: value for name, value in config.items() if not name.startswith(("mm_", "vision_", "image_", "use_mm"))}
    text |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(text))
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save(
        {n: t for n, t in state.items() if "mm_projector" not in n and "vision_tower" not in n}, folder / "pytorch_model.bin"
    )
    return folder


def projector_state():
    state = torch.load(STUDENT / "pytorch_model.bin", weights_only=True)
    return {name: tensor for name, tensor in state.items() if "mm_projector" in name}


def new_student(llama, out, *more):
    words = ["new-student", "--language-model", llama, "--tower", CLIP, "--out", out, *more]
    main([str(word) for word in words], standalone_mode=False)
    return load_vlm(out)


def state_of(vlm, part):
    return {name: tensor for name, tensor in vlm.model.state_dict().items() if part in name}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_parts_keep_their_weights_and_the_projector_is_drawn_with_the_seed(llama, student_vlm, tmp_path, capsys):
    vlm = new_student(llama, tmp_path / "one", "--json")
    figures = json.loads(capsys.readouterr().out)
    assert figures["vision_tokens_per_image"] == 144
    assert figures["dtype"] == "float32"
    for part in ("language_model", "lm_head", "vision_tower"):
        assert equal(state_of(vlm, part), state_of(student_vlm, part)), part
    assert vlm.image_fingerprint() == student_vlm.image_fingerprint()
    assert vlm.tokenizer_fingerprint() == student_vlm.tokenizer_fingerprint()
    drawn = state_of(vlm, "projector")
    assert drawn.keys() == state_of(student_vlm, "projector").keys()
    assert equal(drawn, state_of(new_student(llama, tmp_path / "again"), "projector"))
    assert not equal(drawn, state_of(new_student(llama, tmp_path / "other", "--seed", 1), "projector"))


def test_a_new_student_learns_from_a_cache_and_its_student_loads_again(llama, data, cache, tmp_path):
    new_student(llama, tmp_path / "start")
    figures = train(data, cache, tmp_path / "run", student=str(tmp_path / "start"), max_steps=2)
    assert figures["steps"] == 2
    trained = load_vlm(tmp_path / "run" / "student")
    assert not equal(state_of(trained, "projector"), state_of(load_vlm(tmp_path / "start"), "projector"))
    assert equal(state_of(load_vlm(tmp_path / "run" / "student-official"), ""), state_of(trained, ""))


def test_a_projector_that_was_trained_before_is_taken_whole(llama, student_vlm, tmp_path):
    torch.save(projector_state(), tmp_path / "mm_projector.bin")
    vlm = new_student(llama, tmp_path / "student", "--projector-from", tmp_path / "mm_projector.bin")
    assert equal(state_of(vlm, ""), state_of(student_vlm, ""))


def test_the_projector_of_the_first_mobilevlm_halves_the_grid_of_patches(llama, tmp_path):
    vlm = new_student(llama, tmp_path / "student", "--projector", "ldpnet", "--dtype", "bfloat16")
    assert vlm.vision_tokens_per_image == 144  # 24 x 24 patches
    assert '"dtype": "bfloat16"' in (tmp_path / "student" / "config.json").read_text()
    assert new_student(llama, tmp_path / "small", "--grid", 8).vision_tokens_per_image == 64


def _with(folder, source, **changes):
    shutil.copytree(source, folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_parts_that_do_not_serve_are_refused_and_nothing_is_written(llama, tmp_path):
    torch.save({name: tensor[:1] for name, tensor in projector_state().items()}, tmp_path / "cut.bin")
    torch.save(dict.fromkeys(["a"], torch.zeros(1)), tmp_path / "other.bin")
    wide = _with(tmp_path / "wide", llama, hidden_size=64)
    gpt, siglip = _with(tmp_path / "gpt", llama, model_type="gpt2"), _with(tmp_path / "siglip", CLIP, model_type="siglip")
    bare = shutil.copytree(llama, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    out = tmp_path / "out"
    for words, message in (
        (("--language-model", gpt), "has model_type 'gpt2'; MobileVLM's projectors serve students with a Llama"),
        (("--language-model", STUDENT), "has model_type 'mobilevlm'"),
        (("--language-model", wide), "the weights do not match the configuration"),
        (("--language-model", bare), "holds no tokenizer"),
        (("--language-model", "org/none"), "is not a folder, and the local Hugging Face cache"),
        (("--tower", siglip), "has model_type 'siglip'; expected a CLIP model"),
        (("--grid", 25), "--grid 25: the tower .* has 24 x 24 patches"),
        (("--projector-from", tmp_path / "cut.bin"), "is not this projector's: .* expected"),
        (("--projector-from", tmp_path / "other.bin"), "is not this projector's: a is"),
        (("--projector-from", tmp_path / "none.bin"), "is missing"),
        (("--out", llama), "is not empty"),
    ):
        with pytest.raises(UserError) as refused:
            new_student(llama, out, *words)
        assert re.search(message, refused.value.message), (words, refused.value.message)
    assert not out.exists()
