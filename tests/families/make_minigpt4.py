"""MiniGPT-4 as it is released: EVA's and LAVIS's names, a Vicuna folder, and the configuration that names all four."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_mobilevlm_v1 import copy_tokenizer
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from alignkd.models.checkpoints.tokenizer_files import load_tokenizer
from alignkd.models.loading import load_vlm, save_vlm

QUERIES = 4
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28}
QFORMER = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class _Weights(dict[str, torch.Tensor]):
    """Random tensors by name."""

    def matrix(self, name: str, *shape: int) -> None:
        self[name] = torch.randn(*shape) * 1.5 / shape[-1] ** 0.5

    def linear(self, name: str, inside: int, outside: int) -> None:
        self.matrix(f"{name}.weight", outside, inside)
        self[f"{name}.bias"] = torch.randn(outside) * 0.3

    def norm(self, name: str, width: int) -> None:
        self[f"{name}.weight"], self[f"{name}.bias"] = 1 + 0.2 * torch.randn(width), 0.3 * torch.randn(width)


def eva_state() -> dict[str, torch.Tensor]:
    """The vision file, with the block, norm and head that nobody reads."""
    state, width, patches = _Weights(), TOWER["hidden_size"], (TOWER["image_size"] // 14) ** 2
    state["cls_token"], state["pos_embed"] = torch.randn(1, 1, width), torch.randn(1, patches + 1, width)
    state["patch_embed.proj.weight"], state["patch_embed.proj.bias"] = torch.randn(width, 3, 14, 14) * 0.1, torch.randn(width)
    for i in range(TOWER["num_hidden_layers"] + 1):
        state.norm(f"blocks.{i}.norm1", width)
        state.norm(f"blocks.{i}.norm2", width)
        state.matrix(f"blocks.{i}.attn.qkv.weight", 3 * width, width)
        state[f"blocks.{i}.attn.q_bias"], state[f"blocks.{i}.attn.v_bias"] = torch.randn(width), torch.randn(width)
        state.linear(f"blocks.{i}.attn.proj", width, width)
        state.linear(f"blocks.{i}.mlp.fc1", width, TOWER["intermediate_size"])
        state.linear(f"blocks.{i}.mlp.fc2", TOWER["intermediate_size"], width)
    state.norm("norm", width)
    state.linear("head", width, 5)
    return dict(state)


def qformer_state() -> dict[str, torch.Tensor]:
    """BLIP-2's file: queries, Q-Former, norm, and the layer into Flan-T5."""
    state, width, tower = _Weights(), QFORMER["hidden_size"], TOWER["hidden_size"]
    state["query_tokens"] = torch.randn(1, QUERIES, width)
    state.norm("ln_vision", tower)
    state.norm("Qformer.bert.embeddings.LayerNorm", width)
    state["Qformer.bert.embeddings.position_ids"] = torch.arange(8)[None]
    for i in range(QFORMER["num_hidden_layers"]):
        layer = f"Qformer.bert.encoder.layer.{i}"
        for attention, read in (("attention", width), ("crossattention", tower)):
            if attention == "crossattention" and i % 2:
                continue
            state.linear(f"{layer}.{attention}.self.query", width, width)
            state.linear(f"{layer}.{attention}.self.key", read, width)
            state.linear(f"{layer}.{attention}.self.value", read, width)
            state.linear(f"{layer}.{attention}.output.dense", width, width)
            state.norm(f"{layer}.{attention}.output.LayerNorm", width)
        state.linear(f"{layer}.intermediate_query.dense", width, QFORMER["intermediate_size"])
        state.linear(f"{layer}.output_query.dense", QFORMER["intermediate_size"], width)
        state.norm(f"{layer}.output_query.LayerNorm", width)
    state.linear("t5_proj", width, 7)
    return dict(state)


def write_released(folder: Path, seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """The four downloads and their configuration; returns the weights of each file under its own names."""
    torch.manual_seed(seed)
    text = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    llama = LlamaForCausalLM(text)
    with torch.no_grad():
        for parameter in llama.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    folder.mkdir(parents=True)
    llama.save_pretrained(folder / "vicuna")
    copy_tokenizer(folder / "vicuna")
    projection = _Weights()
    projection.linear("llama_proj", QFORMER["hidden_size"], text.hidden_size)
    files = {"vision": eva_state(), "qformer": qformer_state(), "projection": dict(projection)}
    names = {"vision": "eva_vit_g.pth", "qformer": "blip2_pretrained_flant5xxl.pth", "projection": "pretrained_minigpt4_7b.pth"}
    torch.save(files["vision"], folder / names["vision"])
    torch.save({"model": files["qformer"]}, folder / names["qformer"])
    torch.save({"model": files["projection"], "epoch": 3, "config": {"run": {}}}, folder / names["projection"])
    sizes = {"vision_config": TOWER, "qformer_config": QFORMER, "num_query_tokens": QUERIES}
    (folder / "config.json").write_text(json.dumps({"model_type": "minigpt4", "vicuna": "vicuna", **names, **sizes}))
    return {"vicuna": llama.state_dict(), **files}


def write(folder: Path, seed: int = 0) -> None:
    """As alignkd saves it, in one folder that transformers' own loader opens."""
    write_released(folder / "released", seed)
    save_vlm(load_vlm(folder / "released"), folder)
    shutil.rmtree(folder / "released")


def pixels(image: Image.Image) -> torch.Tensor:
    """As the released preprocessing makes them: stretched, scaled, normalised."""
    side = TOWER["image_size"]
    scaled = np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    values = (scaled - np.asarray(MEAN, np.float32)) / np.asarray(DEVIATION, np.float32)
    return torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1)


def plain(folder: Path, turns: Sequence[tuple[str, str]], images: Sequence[Image.Image], opened: bool) -> dict[str, Any]:
    """The released code's prompt, split at its images and where an answer begins, each piece tokenised by itself."""
    del opened  # a prompt ends where the answer begins
    tokenizer, ids = load_tokenizer(folder), [1]

    def add(text: str) -> None:
        ids.extend(tokenizer(text, add_special_tokens=False).input_ids)

    before = "###"
    for speaker, text in turns:
        if speaker == "system":
            before = f"{text}###"
            continue
        if speaker == "gpt":
            add(f"{text}###")
            continue
        count, question = text.count("<image>"), text.replace("<image>", "").strip()
        shown = " ".join(["<Img><ImageHere></Img>"] * count + [question])
        first, *rest = f"{before}Human: {shown} ###Assistant: ".split("<ImageHere>")
        before = ""
        add(first)
        for segment in rest:
            ids.extend([-200] * QUERIES)
            add(segment)
    values = torch.stack([pixels(image) for image in images]) if images else torch.zeros(1, 3, 28, 28)
    return {"input_ids": torch.tensor([ids]), "pixel_values": values}
