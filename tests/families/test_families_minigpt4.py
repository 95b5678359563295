"""MiniGPT-4 from the files of its release: its vision half restated, its prompt, and what is refused by name."""

from __future__ import annotations

import json
import math

import make_minigpt4
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from alignkd.inputs.prompts import IGNORE
from alignkd.models.loading import load_vlm
from alignkd.pipeline.evaluate.running.prefix import answer_sharing as answer

TURNS = [("human", "<image>\nWhat is it?"), ("gpt", "a dog")]
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The folder of a release, and the weights of each of its files."""
    folder = tmp_path_factory.mktemp("minigpt4") / "released"
    return folder, make_minigpt4.write_released(folder)


@pytest.fixture
def changed(tmp_path):
    """A release of its own, to be damaged."""
    return tmp_path / "released", make_minigpt4.write_released(tmp_path / "released")


def norm(x, w, name, eps):
    return functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def attend(q, k, v, heads):
    q, k, v = (x.unflatten(1, (heads, -1)).transpose(0, 1) for x in (q, k, v))
    weight = (q @ k.transpose(1, 2) / math.sqrt(q.shape[2])).softmax(2)
    return (weight @ v).transpose(0, 1).flatten(1)


def restated(files, pixels):
    """Vision tokens ``[Q, D]`` of one image, from the tensors under the names of the release."""
    w, tower = files["vision"], make_minigpt4.TOWER
    x = functional.conv2d(pixels[None], w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=14)[0]
    x = torch.cat([w["cls_token"][0], x.flatten(1).T]) + w["pos_embed"][0]
    for i in range(tower["num_hidden_layers"]):
        block = f"blocks.{i}"
        h = norm(x, w, f"{block}.norm1", 1e-6)
        q, k, v = (h @ part.T for part in w[f"{block}.attn.qkv.weight"].chunk(3))
        q, v = q + w[f"{block}.attn.q_bias"], v + w[f"{block}.attn.v_bias"]
        x = x + linear(attend(q, k, v, tower["num_attention_heads"]), w, f"{block}.attn.proj")
        h = functional.gelu(linear(norm(x, w, f"{block}.norm2", 1e-6), w, f"{block}.mlp.fc1"))
        x = x + linear(h, w, f"{block}.mlp.fc2")
    w = files["qformer"]
    seen = norm(x, w, "ln_vision", 1e-5)
    x = norm(w["query_tokens"][0], w, "Qformer.bert.embeddings.LayerNorm", 1e-12)
    for i in range(make_minigpt4.QFORMER["num_hidden_layers"]):
        layer = f"Qformer.bert.encoder.layer.{i}"
        for attention, read in (("attention", None), ("crossattention", seen))[: 1 if i % 2 else 2]:
            source = x if read is None else read
            q, k, v = (
                linear(states, w, f"{layer}.{attention}.self.{name}")
                for states, name in ((x, "query"), (source, "key"), (source, "value"))
            )
            h = linear(attend(q, k, v, make_minigpt4.QFORMER["num_attention_heads"]), w, f"{layer}.{attention}.output.dense")
            x = norm(x + h, w, f"{layer}.{attention}.output.LayerNorm", 1e-12)
        h = functional.gelu(linear(x, w, f"{layer}.intermediate_query.dense"))
        x = norm(x + linear(h, w, f"{layer}.output_query.dense"), w, f"{layer}.output_query.LayerNorm", 1e-12)
    return linear(x, files["projection"], "llama_proj")


def test_vision_tokens_are_those_of_the_restatement_on_the_released_names(released):
    folder, files = released
    vlm = load_vlm(folder)
    pixels = make_minigpt4.pixels(PICTURE)
    with torch.no_grad():
        found = vlm.model.encode_images(pixels[None])[0]
    torch.testing.assert_close(found, restated(files, pixels), rtol=1e-4, atol=1e-4)


def test_the_norm_after_the_tower_has_the_epsilon_of_the_release(released):
    folder, files = released
    vlm = load_vlm(folder)
    vlm.model.vision_model.encoder = _Constant()
    x = torch.linspace(-1e-3, 1e-3, 16)[None, None].expand(1, 5, -1)
    vlm.model.vision_model.encoder.value = x
    with torch.no_grad():
        found = vlm.model.vision_model(torch.zeros(1, 3, 28, 28)).last_hidden_state
    torch.testing.assert_close(found, norm(x, files["qformer"], "ln_vision", 1e-5))


class _Constant(torch.nn.Module):
    def forward(self, **kwargs):
        from transformers.modeling_outputs import BaseModelOutput

        return BaseModelOutput(last_hidden_state=self.value)


def test_the_language_model_is_vicunas(released):
    folder, files = released
    state = load_vlm(folder).model.language_model.state_dict()
    assert set(state) == set(files["vicuna"])
    assert all(torch.equal(state[name], tensor) for name, tensor in files["vicuna"].items())


def test_everything_but_projection_and_language_model_is_frozen(released):
    vlm = load_vlm(released[0])
    vlm.freeze_tower()
    trained = {name.split(".")[0] for name, parameter in vlm.model.named_parameters() if parameter.requires_grad}
    assert trained == {"language_projection", "language_model"}


def test_a_checkpoint_of_its_own_queries_goes_before_blip2s(changed):
    folder, files = changed
    queries = torch.randn_like(files["qformer"]["query_tokens"])
    torch.save({"model": {**files["projection"], "query_tokens": queries}}, folder / "pretrained_minigpt4_7b.pth")
    assert torch.equal(load_vlm(folder).model.query_tokens, queries)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_of_it_loads_in_the_dtype_asked_for(released, dtype):
    vlm = load_vlm(released[0], dtype=dtype)
    assert {p.dtype for p in vlm.model.parameters()} == {dtype}
    with torch.no_grad():
        assert vlm.model.encode_images(make_minigpt4.pixels(PICTURE)[None]).isfinite().all()


def test_the_published_sizes_are_those_where_the_configuration_names_none(changed):
    folder, _ = changed
    config = json.loads((folder / "config.json").read_text())
    for name in ("vision_config", "qformer_config", "num_query_tokens"):
        del config[name]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lack qformer\.encoder\.layer\.10\."):
        load_vlm(folder)


# --- the prompt --------------------------------------------------------------------------------------------------------


def test_the_prompt_is_that_of_the_second_stage(released):
    vlm = load_vlm(released[0])
    encoder = vlm.encoder("vicuna0", 512)
    turns = [*TURNS, ("human", "Sure?"), ("gpt", "yes")]
    made, _ = encoder.finish(turns, encoder.plan(turns, 1), [encoder.load(PICTURE)])
    at = int(np.flatnonzero(made.input_ids == -200)[0])
    before, after = made.input_ids[:at].tolist(), made.input_ids[at + 1 :].tolist()
    assert before[0] == vlm.tokenizer.bos_token_id
    assert vlm.tokenizer.decode(before[1:]) == "###Human: <Img>"
    said = "".join(vlm.tokenizer.decode(after).split())
    assert said == "</Img>Whatisit?###Assistant:adog###Human:Sure?###Assistant:yes###"
    assert "".join(vlm.tokenizer.decode(made.labels[made.labels != IGNORE]).split()) == "adog###yes###"


class _Script(torch.nn.Module):
    """An output head that says given ids, one a step."""

    def __init__(self, ids):
        super().__init__()
        self.ids, self.said = ids, []

    def forward(self, hidden):
        self.said.append(self.ids[len(self.said)])
        logits = torch.zeros(*hidden.shape[:2], 512)
        logits[:, :, self.said[-1]] = 1
        return logits


def test_an_answer_ends_with_its_mark(released):
    vlm = load_vlm(released[0])
    encoder = vlm.encoder("vicuna0", 512)
    question = encoder.question(TURNS, [encoder.load(PICTURE)])
    ids = vlm.tokenizer("a dog###Human: go on", add_special_tokens=False).input_ids
    vlm.model.language_model.lm_head = _Script(ids)
    assert answer(vlm, [question], len(ids)) == ["a dog"]
    assert vlm.tokenizer.decode(vlm.model.language_model.lm_head.said) == "a dog###"


# --- refusals ----------------------------------------------------------------------------------------------------------


def rewrite(folder, **changes):
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_a_configuration_without_a_q_former_is_refused(changed):
    rewrite(changed[0], qformer=None)
    with pytest.raises(ValueError, match=r"it lacks qformer.*Llama 2 version"):
        load_vlm(changed[0])


def test_a_file_that_is_not_there_is_named(changed):
    (changed[0] / "eva_vit_g.pth").unlink()
    with pytest.raises(ValueError, match=r"eva_vit_g\.pth is missing"):
        load_vlm(changed[0])


@pytest.mark.parametrize(
    ("place", "name", "message"),
    [
        ("eva_vit_g.pth", "blocks.0.gamma_1", r"eva_vit_g\.pth holds blocks\.0\.gamma_1, which no vision file"),
        (
            "blip2_pretrained_flant5xxl.pth",
            "visual_encoder.a",
            r"flant5xxl\.pth holds visual_encoder\.a, which no qformer file",
        ),
        ("pretrained_minigpt4_7b.pth", "llama_model.b", r"7b\.pth holds llama_model\.b, which no projection file"),
    ],
)
def test_a_tensor_that_the_release_does_not_have_is_refused_by_name(changed, place, name, message):
    folder, _ = changed
    state = torch.load(folder / place, weights_only=True)
    state.get("model", state)[name] = torch.zeros(1)
    torch.save(state, folder / place)
    with pytest.raises(ValueError, match=message):
        load_vlm(folder)


def test_a_tensor_that_is_missing_is_refused_by_name(changed):
    folder, files = changed
    kept = {k: v for k, v in files["qformer"].items() if k != "ln_vision.weight"}
    torch.save({"model": kept}, folder / "blip2_pretrained_flant5xxl.pth")
    with pytest.raises(ValueError, match=r"lack vision_model\.post_layernorm\.weight"):
        load_vlm(folder)


def test_half_a_bias_of_the_queries_and_values_is_refused(changed):
    folder, files = changed
    torch.save({k: v for k, v in files["vision"].items() if k != "blocks.0.attn.v_bias"}, folder / "eva_vit_g.pth")
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.qkv\.bias is \(32,\), expected \(48,\)"):
        load_vlm(folder)


def test_a_projection_of_another_width_is_refused_with_both_shapes(changed):
    folder, _ = changed
    wide = {"llama_proj.weight": torch.zeros(32, 96), "llama_proj.bias": torch.zeros(32)}
    torch.save({"model": wide}, folder / "pretrained_minigpt4_7b.pth")
    with pytest.raises(ValueError, match=r"language_projection\.weight is \(32, 96\), expected \(32, 24\)"):
        load_vlm(folder)


def test_nothing_is_unpickled_from_its_files(changed):
    class Trap:
        def __reduce__(self):
            return (exec, ("raise SystemExit",))

    folder, files = changed
    torch.save({"model": files["projection"], "trap": Trap()}, folder / "pretrained_minigpt4_7b.pth")
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        load_vlm(folder)


def test_another_language_model_is_refused(changed):
    folder, _ = changed
    path = folder / "vicuna" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "mistral"}))
    with pytest.raises(ValueError, match="model_type is 'mistral'; Vicuna is 'llama'"):
        load_vlm(folder)


def test_text_that_holds_the_end_mark_is_refused(released):
    encoder = load_vlm(released[0]).encoder("vicuna0", 512)
    with pytest.raises(ValueError, match="special token '###'"):
        encoder.plan([("human", "<image>\nWhat?"), ("gpt", "### A heading")], 1)
