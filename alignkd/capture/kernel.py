"""Where attention is recorded: in the model's own kernel, under its own name, so that the model runs as it does without us.

transformers' fast kernel ("sdpa") is registered anew under its name as :func:`_attend`, which is that kernel, and computes
probabilities as well where a call brings a :class:`Tap`. Models ask for the name of their kernel when they build masks, so it
must not change. Models that need the slow kernel ("eager") give all probabilities of a layer: a hook on the layer takes them.

Shapes: B samples, S positions, H heads, d head width, T text rows, V vision columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import repeat_kv

from alignkd.capture.probabilities import of_whole, text_to_vision
from alignkd.errors import CheckpointError, wrap_errors
from alignkd.inputs.batch import Batch
from alignkd.models.vlm import Vlm

TAP = "alignkd_tap"
"""The keyword that carries a :class:`Tap` down to the attention of each layer."""

_HARMLESS = frozenset(
    {
        *("scaling", "dropout", "is_causal"),  # used
        *("sliding_window",),  # in the mask
        *("position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "return_dict"),
        *("input_ids", "inputs_embeds", "pixel_values", "mm_encoder_outputs", "token_type_ids", "mm_token_type_ids"),
        *("logits_to_keep", "num_items_in_batch", "output_router_logits"),
    }
)
"""Keywords that change nothing in a kernel."""
_IN_THE_MASK = frozenset({"block_indices", "indices"})
"""Keywords that say which keys a row reads: a model that is given a mask has written them into it."""


@dataclass
class Tap:
    """A request for the attention of some layers, and what was found, ``[B, H, T, V]`` each.

    ``exact``: where given, the same is found there in float32, of queries and keys in their own dtype.
    """

    batch: Batch
    layers: frozenset[int]
    found: dict[int, torch.Tensor] = field(default_factory=dict)
    exact: dict[int, torch.Tensor] | None = None


def use_tapped_kernel(vlm: Vlm) -> None:
    """Let the attention of the language model be recorded.

    Raises:
        CheckpointError: its kernel is one that cannot be recorded, and the model has no other.
    """
    config = getattr(vlm.decoder, "config", vlm.text_config)
    if config._attn_implementation not in ("sdpa", "eager"):
        with wrap_errors(CheckpointError, f"{vlm.folder}: its attention ({config._attn_implementation}) cannot be captured"):
            vlm.model.set_attn_implementation({"text_config": "sdpa"})
    if config._attn_implementation != "eager":
        return
    for layer in vlm.decoder.layers:
        attention = getattr(layer, "self_attn", None)
        if attention is not None and not any(hook is _take for hook in attention._forward_hooks.values()):
            attention.register_forward_hook(_take, with_kwargs=True)


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    alignkd_tap: Tap | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    tap, layer = alignkd_tap, cast(int, getattr(module, "layer_idx", None))
    if tap is not None and layer in tap.layers:
        _check_keywords(module, tap.batch, attention_mask, kwargs)
        scaling = kwargs.get("scaling")
        scaling = query.shape[3] ** -0.5 if scaling is None else scaling
        key_BHSd = repeat_kv(key, query.shape[1] // key.shape[1])
        row_BHTd = tap.batch.text_rows_BT[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
        query_BHTd, mask = query.gather(2, row_BHTd), _mask(module, tap.batch, attention_mask, kwargs)
        tap.found.setdefault(layer, text_to_vision(query_BHTd, key_BHSd, tap.batch, scaling, mask))
        if tap.exact is not None:
            tap.exact[layer] = text_to_vision(query_BHTd.float(), key_BHSd.float(), tap.batch, scaling, mask)
    output: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return output


def _check_keywords(module: nn.Module, batch: Batch, attention_mask: torch.Tensor | None, keywords: Mapping[str, Any]) -> None:
    """Refuse what would change attention and is not read here."""
    known = _HARMLESS | batch.token_inputs.keys() | batch.image_inputs.keys()
    known |= _IN_THE_MASK if attention_mask is not None else frozenset()
    if unknown := sorted(name for name, value in keywords.items() if value is not None and name not in known):
        raise CheckpointError(
            f"{type(module).__name__} gives its attention {', '.join(unknown)}, which a captured attention would leave out: the"
            f" model cannot be used (layer {getattr(module, 'layer_idx', None)})"
        )


def _mask(
    module: nn.Module, batch: Batch, attention_mask: torch.Tensor | None, keywords: Mapping[str, Any]
) -> torch.Tensor | None:
    """What the fast kernel does without a mask: see everything up to a row or, where attention is not causal, everything."""
    causal = keywords.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if attention_mask is not None or causal:
        return attention_mask
    return batch.attention_mask_BS[:, None, None, :].expand(-1, 1, batch.input_ids_BS.shape[1], -1)


def _take(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
    """The hook of the slow kernel: its probabilities are the second output."""
    del args
    tap, layer = cast(Tap | None, keywords.get(TAP)), cast(int, getattr(module, "layer_idx", None))
    if tap is None or layer not in tap.layers:
        return
    if module.training and getattr(module, "attention_dropout", None):
        raise CheckpointError(
            f"{type(module).__name__} drops out a part of its attention (attention_dropout), and needs the slow kernel, which"
            " gives its probabilities after that alone: set attention_dropout to 0 in config.json"
        )
    whole_BHSS = output[1] if isinstance(output, tuple) and len(output) > 1 else None
    if isinstance(whole_BHSS, torch.Tensor) and whole_BHSS.shape[2:] == (tap.batch.input_ids_BS.shape[1],) * 2:
        attention_BHTV = of_whole(whole_BHSS, tap.batch)
        tap.found.setdefault(layer, attention_BHTV)
        if tap.exact is not None:
            tap.exact[layer] = attention_BHTV


AttentionInterface.register("sdpa", _attend)
