"""One forward pass -> first-layer text-to-vision attention, vision tokens, hidden states at answer positions.

1. The vision tower (frozen) and the projector give the vision tokens.
2. The decoder runs with an attention function that is the fast kernel everywhere; in the first layer it also computes the
   probabilities of the wanted rows (text after the image) and columns (vision), with the exact softmax denominator.
3. The last hidden states are gathered at the positions that predict a supervised token; logits exist for these alone.

Everything is differentiable. ``output_attentions`` would instead keep every layer's [H, S, S] and the slow kernel.

Shapes: B samples, S positions, H heads, d head width, T text rows, V vision columns, N images, A answers, D model width.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.llama.modeling_llama import repeat_kv

from alignkd.batch import Batch
from alignkd.models.mobilevlm import MobileVlm, MobileVlmModel

_KERNEL = "alignkd_capture"
_MAX_SCORES = 2**26
"""Scores held at a time (256 MB in float32): longer prompts are captured in chunks of rows, recomputed in backward."""


@dataclass
class Captured:
    """What one forward pass gave.

    ``attention_BHTV``: float32 probabilities, zero where padded; None when not asked for.
    ``vision_BVD``: vision tokens, zero where padded.
    ``hidden_AD``: last hidden states (after the final norm) at answer positions.
    """

    attention_BHTV: torch.Tensor | None
    vision_BVD: torch.Tensor
    hidden_AD: torch.Tensor


@dataclass
class _Tap:
    """A request to the first layer's attention, and its answer."""

    batch: Batch
    attention_BHTV: torch.Tensor | None = field(default=None)


def enable_capture(model: MobileVlm) -> None:
    """Let the language model's attention go through the capturing kernel; outputs are unchanged."""
    model.set_attn_implementation({"text_config": _KERNEL})


def first_attention(model: MobileVlm) -> nn.Module:
    """The attention module of the first decoder layer."""
    module: nn.Module = model.model.language_model.layers[0].self_attn
    return module


def capture(model: MobileVlm, batch: Batch, *, attention: bool = True) -> Captured:
    """Run the model once over a batch and gather what Align-KD compares.

    ``batch.images`` are pixel values ``[N, 3, h, w]`` or, where the frozen tower already ran, features ``[N, P, C]``.
    """
    tokens_NVD, vision_BVD = vision_tokens(model.model, batch)
    tap = _Tap(batch) if attention and has_attention(batch) else None
    if tap is not None and model.config.text_config._attn_implementation != _KERNEL:
        enable_capture(model)
    # Passed down to the attention function with the call itself, so that gradient checkpointing, which runs the layer
    # again during backward, meets the same operations, and no later call meets them.
    hidden_BSD = model.model.decode(
        batch.input_ids_BS, batch.attention_mask_BS, tokens_NVD, batch.vision_positions, alignkd_tap=tap
    )
    if tap is not None:
        assert tap.attention_BHTV is not None, "the first layer did not run through the capturing kernel"
        captured = tap.attention_BHTV
    else:
        captured = no_attention(batch, model.config.text_config.num_attention_heads)
    hidden_AD = hidden_BSD.flatten(0, 1).index_select(0, batch.answer_positions_A)
    return Captured(captured if attention else None, vision_BVD, hidden_AD)


def vision_tokens(model: MobileVlmModel, batch: Batch) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Projected tokens of the N images ``[N, V, D]`` (None without images), and by sample, zero where padded, ``[B, V, D]``."""
    width = model.config.text_config.hidden_size
    samples, columns = batch.vision_columns_BV.shape
    if not batch.images.numel():
        return None, torch.zeros(samples, columns, width, dtype=model.dtype, device=batch.input_ids_BS.device)
    features_NPC = batch.images if batch.images.dim() == 3 else model.encode_images(batch.images)
    tokens_NVD = model.project(features_NPC.to(model.dtype))
    flat = tokens_NVD.new_zeros(samples * columns, width)
    return tokens_NVD, flat.index_copy(0, batch.vision_slots, tokens_NVD.flatten(0, 1)).view(samples, columns, width)


def has_attention(batch: Batch) -> bool:
    """Whether any sample has text after an image."""
    return bool(batch.vision_columns_BV.shape[1] and batch.text_rows_BT.shape[1])


def no_attention(batch: Batch, heads: int) -> torch.Tensor:
    """The empty ``[B, H, T, V]`` of a batch without :func:`has_attention`."""
    shape = (batch.samples, heads, batch.text_rows_BT.shape[1], batch.vision_columns_BV.shape[1])
    return torch.zeros(shape, device=batch.input_ids_BS.device)


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    alignkd_tap: _Tap | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    tap = alignkd_tap if module.layer_idx == 0 else None
    if tap is not None:
        groups = query.shape[1] // key.shape[1]
        row_BHTd = tap.batch.text_rows_BT[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
        probabilities = text_to_vision(query.gather(2, row_BHTd), repeat_kv(key, groups), tap.batch, kwargs["scaling"])
        if tap.attention_BHTV is None:
            tap.attention_BHTV = probabilities
    output: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return output


def text_to_vision(query_BHTd: torch.Tensor, key_BHSd: torch.Tensor, batch: Batch, scaling: float) -> torch.Tensor:
    """Attention probabilities of text rows and vision columns, ``[B, H, T, V]`` in float32, zero where padded.

    Queries are those of the text rows alone, keys those of all positions: the softmax denominator is exact.
    """
    samples, heads, rows, _ = query_BHTd.shape
    chunk = max(1, _MAX_SCORES // (samples * heads * key_BHSd.shape[2]))
    parts = []
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        row_BT = batch.text_rows_BT[:, part]
        arguments = (query_BHTd[:, :, part], key_BHSd, row_BT, batch.attention_mask_BS, batch.vision_columns_BV, scaling)
        if rows > chunk and torch.is_grad_enabled():
            parts.append(checkpoint(_attention_rows, *arguments, use_reentrant=False))
        else:
            parts.append(_attention_rows(*arguments))
    attention_BHTV = torch.cat(parts, dim=2)
    real_BTV = batch.text_mask_BT[:, :, None] & batch.vision_mask_BV[:, None, :]
    return attention_BHTV * real_BTV[:, None]


def _attention_rows(
    query_BHTd: torch.Tensor,
    key_BHSd: torch.Tensor,
    row_BT: torch.Tensor,
    real_BS: torch.Tensor,
    column_BV: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    heads, positions = key_BHSd.shape[1:3]
    scores_BHTS = (query_BHTd @ key_BHSd.transpose(2, 3)).float() * scaling
    key_position = torch.arange(positions, device=row_BT.device)
    visible_BTS = (key_position <= row_BT[:, :, None]) & real_BS[:, None, :]
    denominator_BHT1 = scores_BHTS.masked_fill(~visible_BTS[:, None], -torch.inf).logsumexp(3, keepdim=True)
    index_BHTV = column_BV[:, None, None, :].expand(-1, heads, row_BT.shape[1], -1)
    probability_BHTV = (scores_BHTS.gather(3, index_BHTV) - denominator_BHT1).exp()
    # A text row between two images does not see the later one.
    return probability_BHTV * (column_BV[:, None, None, :] <= row_BT[:, None, :, None])


AttentionInterface.register(_KERNEL, _attend)
AttentionMaskInterface.register(_KERNEL, sdpa_mask)
