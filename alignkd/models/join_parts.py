"""A MobileVLM of a Llama, a CLIP tower and a projector that is new, or was trained before: the start of a student."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from alignkd.errors import CheckpointError, wrap_errors
from alignkd.models.checkpoints.build import build_model
from alignkd.models.checkpoints.clip_tower import image_settings, tower_config
from alignkd.models.checkpoints.mobilevlm_layout import BUFFERS, TO_OURS, rename, tie_embeddings, tower_state
from alignkd.models.checkpoints.state_files import read_state, read_wrapped
from alignkd.models.checkpoints.tokenizer_files import check_tokenizer, load_tokenizer
from alignkd.models.config_files import check_sizes, read_config, short
from alignkd.models.encoders.images import ImagePreprocessor
from alignkd.models.families.mobilevlm import MobileVlmFamily
from alignkd.models.modules.ldpv1 import ldpv1_grid
from alignkd.models.modules.mobilevlm import MobileVlm, MobileVlmConfig, new_projector

_PROJECTOR = "model.multi_modal_projector."
_FEATURE_LAYER = -2
_TOWERS = ("clip", "clip_vision_model")


def join_parts(
    language_model: Path,
    tower: Path,
    projector: str,
    *,
    grid: int,
    seed: int,
    dtype: torch.dtype | None,
    projector_file: Path | None = None,
) -> MobileVlmFamily:
    """Join the parts to a model; without ``projector_file`` its projector's weights are drawn with ``seed``.

    ``projector``: ``ldpnet`` or ``ldpnetv2``; ``grid``: side of its grid of vision tokens, which ldpnet takes from the tower.
    ``dtype``: None for that of the language model. Features are those of the tower's last layer but one, images are padded to
    a square, as in MobileVLM's training.

    Raises:
        CheckpointError: a part is of another architecture, or cannot be read, or the parts do not belong together.
    """
    config = _config(language_model, tower, projector, grid)
    tokenizer = load_tokenizer(language_model)
    check_tokenizer(language_model, tokenizer, config.text_config.vocab_size)
    state = {name: tensor for name, tensor in rename(read_state(language_model), TO_OURS).items() if not BUFFERS.search(name)}
    tie_embeddings(config, state)
    kind = dtype or next((tensor.dtype for tensor in state.values()), torch.float32)
    state |= tower_state(tower, tower.name, tower)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new = new_projector(config).state_dict()
    given = new if projector_file is None else _read_projector(projector_file, new)
    state |= {_PROJECTOR + name: tensor for name, tensor in given.items()}
    model = build_model(language_model, config, state, kind, MobileVlm)
    settings = image_settings(tower, None, int(config.vision_config.image_size))
    model.eval()
    return MobileVlmFamily(model, tokenizer, language_model, ImagePreprocessor(settings, config.image_aspect_ratio))


def _config(language_model: Path, tower: Path, projector: str, grid: int) -> MobileVlmConfig:
    text, where = read_config(language_model), language_model / "config.json"
    check_sizes(text, where)
    if text.get("model_type") != "llama":
        raise CheckpointError(
            f"--language-model {language_model} has model_type {short(text.get('model_type'))}; MobileVLM's projectors serve"
            " students with a Llama (model_type 'llama'), such as mtgv/MobileLLaMA-1.4B-Chat"
        )
    kind = read_config(tower).get("model_type")
    if kind not in _TOWERS:
        raise CheckpointError(
            f"--tower {tower} has model_type {short(kind)}; expected a CLIP model, such as openai/clip-vit-large-patch14-336"
        )
    vision = tower_config(str(tower), tower)
    patches = int(vision.image_size) // int(vision.patch_size)
    if projector == "ldpnetv2" and grid > patches:
        raise CheckpointError(
            f"--grid {grid}: the tower {tower} has {patches} x {patches} patches, so its grid of vision tokens is {patches} at"
            " most"
        )
    with wrap_errors(CheckpointError, f"{where} is not the configuration of a Llama"):
        return MobileVlmConfig(
            vision_config=vision.to_dict(),
            text_config=LlamaConfig.from_dict(text).to_dict(),
            vision_feature_layer=_FEATURE_LAYER,
            vision_feature_select_strategy="default",
            projector_type=projector,
            projector_grid=ldpv1_grid(vision.image_size, vision.patch_size) if projector == "ldpnet" else grid,
            image_aspect_ratio="pad",
            tie_word_embeddings=bool(text.get("tie_word_embeddings", False)),
        )


def _read_projector(path: Path, expected: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a projector's file, as LLaVA's and MobileVLM's first training stage saves it.

    Raises:
        CheckpointError: it cannot be read, or is of another projector or of other widths.
    """
    found = {re.sub(r"^.*mm_projector\.", "", name): tensor for name, tensor in read_wrapped(path).items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    if wrong := sorted(name for name in {*shapes, *wanted} if shapes.get(name) != wanted.get(name)):
        name = wrong[0]
        raise CheckpointError(
            f"--projector-from {path} is not this projector's: {name} is {shapes.get(name, 'missing')}, expected"
            f" {wanted.get(name, 'no such tensor')}; give --projector, --language-model and --tower that it was trained for"
        )
    return found
