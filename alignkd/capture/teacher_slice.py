"""The teacher's slice: the few per cent of a teacher that its first-layer attention and its vision tokens depend on.

These are the vision tower, the projector, the token embeddings, and the first layer's input norm and q and k projections.
A cache that stores them once needs neither target in its rows: stage two computes both for each batch, in the teacher's
dtype, by the same code that captured them in stage one.

1. :func:`check_sliceable` refuses a teacher whose first scores depend on anything else.
2. :func:`slice_config` and :func:`slice_tensors` are what a cache stores: the configuration of the slice, and one flat tensor
   for each of its groups, the parameters in the order of their names. The tower is a separate group, because a student that
   has the same frozen tower shares its features.
3. :class:`TeacherSlice` puts them together again, without a copy.

Shapes: B samples, S positions, T text rows, V vision columns of a sample, M vision tokens of a batch, H heads,
d head width, D teacher width.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    repeat_kv,
)
from transformers.utils.generic import maybe_autocast

from alignkd.capture.attention import by_sample, has_attention, no_attention
from alignkd.capture.probabilities import text_to_vision
from alignkd.errors import CacheError, CheckpointError, ConfigError, wrap_errors
from alignkd.inputs.batch import Batch
from alignkd.models.modules.mobilevlm import MobileVlm, MobileVlmConfig, MobileVlmModel, new_projector
from alignkd.models.vlm import Vlm, module_fingerprint
from alignkd.targets.batch_targets import DecodedTargets

TOWER, PROJECTOR = "tower", "projector"
_PREFIXES = {TOWER: "vision_tower.", PROJECTOR: "multi_modal_projector.", "text": "language_model."}
GROUPS = tuple(_PREFIXES)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")
_OTHER_SCORES = ("sliding_window", "attn_logit_softcapping", "query_pre_attn_scalar")

# What determines the slice's shape and values, and nothing else: the configuration in a cache is data from outside.
_FIELDS: dict[str, dict[str, type]] = {
    "text": {
        "hidden_size": int,
        "num_attention_heads": int,
        "num_key_value_heads": int,
        "head_dim": int,
        "vocab_size": int,
        "max_position_embeddings": int,
        "rms_norm_eps": float,
        "rope_parameters": dict,
        "attention_bias": bool,
    },
    "vision": {
        "hidden_size": int,
        "intermediate_size": int,
        "num_hidden_layers": int,
        "num_attention_heads": int,
        "num_channels": int,
        "image_size": int,
        "patch_size": int,
        "hidden_act": str,
        "layer_norm_eps": float,
    },
    "features": {
        "vision_feature_layer": int,
        "vision_feature_select_strategy": str,
        "projector_type": str,
        "projector_grid": int,
    },
}
_MAX_SIZES = {"num_hidden_layers": 256, "projector_grid": 256}
_MAX_SIZE = 2**20


def check_sliceable(vlm: Vlm) -> None:
    """Refuse a teacher whose first-layer attention needs more than embeddings, norm, q, k and static rotary positions.

    Raises:
        ConfigError: names what was found instead.
    """
    if not isinstance(vlm.model, MobileVlm):
        raise ConfigError(
            f"--alignment slice does not serve the family {vlm.family}: {vlm.without_slice}. Cache the targets themselves:"
            " --alignment targets"
        )
    if vlm.teacher_projector is not None:
        raise ConfigError(
            "this teacher sees through a projector of its own teacher, which a slice does not hold. Cache the targets"
            " themselves: --alignment targets"
        )
    text, config = vlm.model.model.language_model, vlm.text_config
    attention = text.layers[0].self_attn
    expected = [
        (attention, LlamaAttention),
        (text.layers[0].input_layernorm, LlamaRMSNorm),
        (text.rotary_emb, LlamaRotaryEmbedding),
    ]
    expected += [(getattr(attention, name, None), nn.Linear) for name in ("q_proj", "k_proj")]
    # Exact types: a subclass may compute something else.
    found = [f"a {type(part).__name__} where {kind.__name__} is expected" for part, kind in expected if type(part) is not kind]
    found += [f"{name} = {getattr(config, name)}" for name in _OTHER_SCORES if getattr(config, name, None) is not None]
    rope = config.rope_parameters["rope_type"]
    if rope in _BATCH_DEPENDENT_ROPE:
        found.append(f"{rope} rotary positions, which depend on the longest prompt of a batch")
    if found:
        raise ConfigError(
            f"this teacher's first-layer attention cannot be recomputed from a slice: it has {'; '.join(found)}. Cache the"
            " targets themselves: --alignment targets"
        )


def slice_config(model: MobileVlm) -> dict[str, dict[str, Any]]:
    """The configuration of a model's slice as plain data: what :class:`TeacherSlice` needs besides the tensors."""
    config = model.config
    sources = {"text": config.text_config, "vision": config.vision_config, "features": config}
    return {part: {name: getattr(sources[part], name) for name in names} for part, names in _FIELDS.items()}


def same_tower(student: Vlm, config: Mapping[str, Any], sha256: str, dtype: torch.dtype) -> bool:
    """Whether the features of the student's tower serve a teacher as well.

    ``config``: the teacher's :func:`slice_config`; ``sha256``: the digest of its tower's weights in ``dtype``, its own. The
    student's are compared in that dtype: it trains in float32, whatever its checkpoint holds.
    """
    if not student.caches_tower:
        return False
    own = slice_config(student.model)
    chosen = ("vision_feature_layer", "vision_feature_select_strategy")
    if config["vision"] != own["vision"] or any(config["features"][name] != own["features"][name] for name in chosen):
        return False
    return module_fingerprint(student.tower, dtype) == sha256


def slice_sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """The number of parameters in each group of a slice.

    Raises:
        CacheError: this is not the configuration of a slice.
    """
    _, shapes = _read(config)
    return {group: sum(shape.numel() for shape in shapes[group].values()) for group in GROUPS}


def slice_tensors(vlm: Vlm, *, tower: bool) -> dict[str, torch.Tensor]:
    """Each group of the slice as one flat tensor ``[parameters]`` on the host, in the model's dtype; ``tower``: the tower too.

    Raises:
        ConfigError: the model cannot be sliced.
        CheckpointError: its tensors do not match its configuration, or hold numbers that are not finite.
    """
    check_sliceable(vlm)
    _, shapes = _read(slice_config(vlm.model))
    state = vlm.model.model.state_dict()
    return {group: _flat(group, shapes[group], state) for group in GROUPS if tower or group != TOWER}


def projector_state(vlm: Vlm) -> torch.Tensor:
    """The parameters of the model's projector as one flat tensor on the host, in the model's dtype.

    Raises:
        CheckpointError: as :func:`slice_tensors`.
    """
    _, shapes = _read(slice_config(vlm.model))
    return _flat(PROJECTOR, shapes[PROJECTOR], vlm.model.model.state_dict())


def projector_of(config: Mapping[str, Any], flat: torch.Tensor) -> nn.Module:
    """The projector of :func:`projector_state`, of a model with this :func:`slice_config`.

    Raises:
        CacheError: the two do not belong together.
    """
    read, shapes = _read(config)
    _check_flat("the teacher's projector", shapes[PROJECTOR], flat)
    with torch.device("meta"):
        projector = new_projector(read)
    parts = torch.split(flat.clone(), [shape.numel() for shape in shapes[PROJECTOR].values()])
    names = [name.removeprefix(_PREFIXES[PROJECTOR]) for name in shapes[PROJECTOR]]
    state = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes[PROJECTOR].values(), strict=True)}
    projector.load_state_dict(state, assign=True)
    return projector


def _flat(group: str, shapes: Mapping[str, torch.Size], state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    wrong = [name for name, shape in shapes.items() if name not in state or state[name].shape != shape]
    if wrong:
        raise CheckpointError(
            f"the teacher's {', '.join(wrong[:3])} is missing or has another shape than its configuration says; merge adapters"
            " into the checkpoint first"
        )
    dtypes = {state[name].dtype for name in shapes}
    if len(dtypes) > 1 or not dtypes <= set(_DTYPES):
        raise CheckpointError(f"the teacher's {group} holds {', '.join(sorted(map(str, dtypes)))}: expected one floating dtype")
    for name in shapes:
        if not state[name].isfinite().all():
            raise CheckpointError(
                f"the teacher's {name} holds NaN or infinite numbers; check the checkpoint, or use another --dtype"
            )
    return torch.cat([state[name].detach().reshape(-1).cpu() for name in shapes])


class TeacherSlice:
    """First-layer attention and vision tokens of a teacher for any batch, from the tensors of its slice.

    Not an ``nn.Module``: it belongs to a cache, so it must not become part of a student's checkpoint. ``head_mean``: give the
    mean of the heads, as a cache of head means does.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor],
        *,
        device: torch.device | str = "cpu",
        head_mean: bool = False,
    ) -> None:
        """Put the groups of :func:`slice_tensors` together; tensors that are already on the device are not copied.

        Raises:
            CacheError: ``config`` and ``tensors`` do not belong together.
        """
        slice_model, shapes = _read(config)
        for group, flat in tensors.items():
            _check_flat(f"the slice's {group}", shapes[group], flat)
        # Buffers (rotary frequencies) are computed, parameters are left empty. The random numbers that modules draw here must
        # not be taken from those of the run.
        with init_empty_weights(include_buffers=False), torch.random.fork_rng(devices=[]):
            self.model = _skeleton(slice_model)
        for group, flat in tensors.items():
            parts = torch.split(flat.to(device), [shape.numel() for shape in shapes[group].values()])
            state = {name: part.view(shape) for part, (name, shape) in zip(parts, shapes[group].items(), strict=True)}
            self.model.load_state_dict(state, strict=False, assign=True)
        if TOWER not in tensors:
            self.model.vision_tower = None
        self.model.requires_grad_(False).eval().to(device)
        self.head_mean = head_mean

    @property
    def shares_tower(self) -> bool:
        """Whether it has no tower: batches must then carry features instead of pixel values."""
        return self.model.vision_tower is None

    @torch.no_grad()
    def fill(self, student: Vlm, batch: Batch, targets: DecodedTargets, needs: frozenset[str]) -> tuple[Batch, DecodedTargets]:
        """See :class:`alignkd.objective.TargetSource`."""
        if self.shares_tower and batch.images.dim() == 4:
            batch = replace(batch, images=student.run_tower(batch.images))
        attention_BHTV, vision_BVD = self.targets(batch, attention="attention" in needs)
        attention = {} if attention_BHTV is None else {0: attention_BHTV}
        return batch, replace(targets, attention=attention, vision_BVD=vision_BVD)

    @torch.no_grad()
    def targets(self, batch: Batch, *, attention: bool = True) -> tuple[torch.Tensor | None, torch.Tensor]:
        """``attention_BHTV`` (None without ``attention``) and ``vision_BVD``, both float32; nothing waits for the device."""
        assert self.shares_tower == (batch.images.dim() == 3) or not batch.images.numel()
        with maybe_autocast(batch.input_ids_BS.device.type, enabled=False):
            tokens_NVD = self.model.encode_images(batch.images)
            tokens_MD = None if tokens_NVD is None else tokens_NVD.flatten(0, 1)
            vision_BVD = by_sample(tokens_MD, batch, self.model.config.text_config.hidden_size, self.model.dtype)
            attention_BHTV = self._attention(batch, tokens_MD) if attention else None
        return attention_BHTV, vision_BVD.float()

    def _attention(self, batch: Batch, tokens_MD: torch.Tensor | None) -> torch.Tensor:
        heads: int = self.model.config.text_config.num_attention_heads
        attention_BHTV = self._text_to_vision(batch, tokens_MD) if has_attention(batch) else no_attention(batch, heads)
        return attention_BHTV.mean(dim=1, keepdim=True) if self.head_mean else attention_BHTV

    def _text_to_vision(self, batch: Batch, tokens_MD: torch.Tensor | None) -> torch.Tensor:
        layer = self.model.language_model.layers[0]
        hidden_BSD = layer.input_layernorm(self.model.embed(batch.input_ids_BS, tokens_MD, batch.vision_positions))
        row_BTD = batch.text_rows_BT[:, :, None].expand(-1, -1, hidden_BSD.shape[2])
        position_1S = torch.arange(hidden_BSD.shape[1], device=hidden_BSD.device)[None]
        query_BHTd = self._rotated(layer.self_attn.q_proj(hidden_BSD.gather(1, row_BTD)), batch.text_rows_BT)
        key_BHSd = self._rotated(layer.self_attn.k_proj(hidden_BSD), position_1S)
        key_BHSd = repeat_kv(key_BHSd, layer.self_attn.num_key_value_groups)
        return text_to_vision(query_BHTd, key_BHSd, batch, layer.self_attn.scaling)

    def _rotated(self, projected: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        text = self.model.language_model
        states = projected.view(*projected.shape[:2], -1, text.layers[0].self_attn.head_dim).transpose(1, 2)
        cosine, sine = text.rotary_emb(states, position)
        # transformers rotates queries and keys of the same positions together; ours differ, so the second is empty.
        rotated: torch.Tensor = apply_rotary_pos_emb(states, states[:, :0], cosine, sine)[0]
        return rotated


def _read(given: Mapping[str, Any]) -> tuple[MobileVlmConfig, dict[str, dict[str, torch.Size]]]:
    """The slice's configuration, and :func:`_shapes`; no tensors of these sizes are allocated.

    Its decoder has one layer, whose parts after the scores are never stored.
    """
    # transformers' configurations raise many kinds of error on values that they do not accept.
    with wrap_errors(CacheError, "this is not the configuration of a teacher's slice"):
        values = {
            part: {name: _checked(name, given[part][name], kind) for name, kind in kinds.items()}
            for part, kinds in _FIELDS.items()
        }
        text = LlamaConfig(**values["text"], num_hidden_layers=1, intermediate_size=1)
        vision = CLIPVisionConfig(**values["vision"])
        config = MobileVlmConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), **values["features"])
        return config, _shapes(config)


def _check_flat(what: str, shapes: Mapping[str, torch.Size], flat: torch.Tensor) -> None:
    expected = sum(shape.numel() for shape in shapes.values())
    if flat.shape != (expected,) or flat.dtype not in _DTYPES:
        raise CacheError(
            f"{what} holds {tuple(flat.shape)} numbers of {flat.dtype}, expected {expected:,} by its"
            " configuration: the cache is damaged; run alignkd cache verify"
        )


def _checked(name: str, value: Any, kind: type) -> Any:
    too_large = isinstance(value, int) and abs(value) > _MAX_SIZES.get(name, _MAX_SIZE)
    if type(value) is not kind or too_large:
        raise ValueError(f"{name} is {value!r}")
    return value


def _skeleton(config: MobileVlmConfig) -> MobileVlmModel:
    """The teacher's modules without those that its first scores do not need."""
    model = MobileVlmModel(config)
    text, layer = model.language_model, model.language_model.layers[0]
    del text.norm, layer.mlp, layer.post_attention_layernorm, layer.self_attn.v_proj, layer.self_attn.o_proj
    return model


def _shapes(config: MobileVlmConfig) -> dict[str, dict[str, torch.Size]]:
    """Name and shape of every tensor of each group, in the order in which they are stored."""
    with torch.device("meta"):
        state = sorted(_skeleton(config).state_dict().items())
    return {
        group: {name: tensor.shape for name, tensor in state if name.startswith(prefix)} for group, prefix in _PREFIXES.items()
    }
