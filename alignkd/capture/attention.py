"""One forward pass -> text-to-vision attention of the first layer or others, vision tokens, hidden states at answers.

1. The vision tower (frozen) and the projector give the vision tokens.
2. The decoder runs with an attention function that is the fast kernel everywhere; in the wanted layers it also computes the
   probabilities of the wanted rows (text after the image) and columns (vision), with the exact softmax denominator.
3. The last hidden states are gathered at the positions that predict a supervised token; logits exist for these alone.

Everything is differentiable. ``output_attentions`` would instead keep every layer's [H, S, S] and the slow kernel.

Shapes: B samples, S positions, H heads, d head width, T text rows, V vision columns, N images, A answers, D model width.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.llama.modeling_llama import repeat_kv
from transformers.utils.generic import maybe_autocast

from alignkd.inputs.batch import Batch
from alignkd.models.vlm import Vlm

_KERNEL = "alignkd_capture"
_MAX_SCORES = 2**24
"""Scores held at a time (64 MB in float32): longer prompts are captured in chunks of rows."""


@dataclass
class Captured:
    """What one forward pass gave.

    ``attention``: of each layer that was asked for, float32 probabilities ``[B, H, T, V]``, zero where padded.
    ``vision_BVD``: vision tokens, zero where padded.
    ``hidden_AD``: last hidden states (after the final norm) at answer positions.
    """

    attention: Mapping[int, torch.Tensor]
    vision_BVD: torch.Tensor
    hidden_AD: torch.Tensor


@dataclass
class _Tap:
    """A request to the attention of some layers, and their answers, ``[B, H, T, V]`` each."""

    batch: Batch
    layers: frozenset[int]
    found: dict[int, torch.Tensor] = field(default_factory=dict)


def enable_capture(vlm: Vlm) -> None:
    """Let the language model's attention go through the capturing kernel; outputs are unchanged.

    Raises:
        ValueError: its attention is no plain softmax of scaled scores, or its logits are no linear map of hidden states.
    """
    text = vlm.text_config
    if (cap := getattr(text, "attn_logit_softcapping", None)) is not None:
        raise ValueError(
            f"{vlm.folder}: its attention scores are capped at {cap} (attn_logit_softcapping), which no fast kernel does"
        )
    if (cap := getattr(text, "final_logit_softcapping", None)) is not None:
        raise ValueError(
            f"{vlm.folder}: its logits are capped at {cap} (final_logit_softcapping), but every loss here reads hidden states"
            " and the output head; use a model whose configuration has none"
        )
    if text._attn_implementation != _KERNEL:
        vlm.model.set_attn_implementation({"text_config": _KERNEL})


def capture(vlm: Vlm, batch: Batch, *, attention: bool = True, layers: Collection[int] = (0,)) -> Captured:
    """Run the model once over a batch and gather what Align-KD compares; ``attention`` that of these ``layers``.

    Raises:
        ValueError: one of the layers has no attention that could be captured.
    """
    vision = vlm.encode_images(batch)
    wanted = frozenset(layers) if attention else frozenset()
    tap = _Tap(batch, wanted) if wanted and has_attention(batch) else None
    if tap is not None:
        enable_capture(vlm)
    # Passed down to the attention function with the call itself, so that gradient checkpointing, which runs the layer
    # again during backward, meets the same operations, and no later call meets them.
    hidden_BSD = vlm.decode(batch, vision, **({} if tap is None else {"alignkd_tap": tap}))
    found = dict.fromkeys(wanted, no_attention(batch, vlm.heads)) if tap is None else tap.found
    if missing := wanted - found.keys():
        raise ValueError(f"{vlm.folder}: no attention of layer {min(missing)} can be captured: there is none, or no softmax")
    hidden_AD = hidden_BSD.flatten(0, 1).index_select(0, batch.answer_positions_A)
    vision_BVD = by_sample(None if vision is None else vision.tokens_MD, batch, vlm.hidden_size, vlm.dtype)
    return Captured(found, vision_BVD, hidden_AD)


def by_sample(tokens_MD: torch.Tensor | None, batch: Batch, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Vision tokens of the batch's images by sample, zero where padded, ``[B, V, D]``."""
    samples, columns = batch.vision_columns_BV.shape
    if tokens_MD is None:
        return torch.zeros(samples, columns, width, dtype=dtype, device=batch.input_ids_BS.device)
    flat = tokens_MD.new_zeros(samples * columns, width)
    return flat.index_copy(0, batch.vision_slots, tokens_MD).view(samples, columns, width)


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
    tap, layer = alignkd_tap, cast(int, getattr(module, "layer_idx", None))
    if tap is not None and layer in tap.layers:
        groups = query.shape[1] // key.shape[1]
        row_BHTd = tap.batch.text_rows_BT[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
        query_BHTd, key_BHSd = query.gather(2, row_BHTd), repeat_kv(key, groups)
        probabilities = text_to_vision(query_BHTd, key_BHSd, tap.batch, kwargs["scaling"], attention_mask)
        tap.found.setdefault(layer, probabilities)
    output: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return output


def text_to_vision(
    query_BHTd: torch.Tensor,
    key_BHSd: torch.Tensor,
    batch: Batch,
    scaling: float,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention probabilities of text rows and vision columns, ``[B, H, T, V]`` in float32, zero where padded.

    Queries are those of the text rows alone, keys those of all positions: the softmax denominator is exact.
    ``attention_mask``: True where a position is seen, ``[B, 1, S, S]``; each row sees all up to itself where it is None.
    """
    seen_BTS = None
    if attention_mask is not None:
        assert attention_mask.dtype == torch.bool, "the mask function of this kernel gives booleans"
        row_BTS = batch.text_rows_BT[:, :, None].expand(-1, -1, attention_mask.shape[3])
        seen_BTS = attention_mask[:, 0].expand(batch.samples, -1, -1).gather(1, row_BTS)
    kind = query_BHTd.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        query_BHTd, key_BHSd = query_BHTd.to(dtype), key_BHSd.to(dtype)
    attention_BHTV: torch.Tensor = _TextToVision.apply(query_BHTd, key_BHSd, seen_BTS, batch, scaling)  # type: ignore[no-untyped-call]
    return attention_BHTV


class _TextToVision(torch.autograd.Function):
    """Rows in chunks: all keys' scores of a chunk are there once in either pass, and none in between."""

    @staticmethod
    def forward(
        ctx: Any,
        query_BHTd: torch.Tensor,
        key_BHSd: torch.Tensor,
        seen_BTS: torch.Tensor | None,
        batch: Batch,
        scaling: float,
    ) -> torch.Tensor:
        samples, heads, rows, _ = query_BHTd.shape
        attention_BHTV = query_BHTd.new_empty(samples, heads, rows, batch.vision_columns_BV.shape[1], dtype=torch.float32)
        denominator_BHT1 = attention_BHTV.new_empty(samples, heads, rows, 1)
        with maybe_autocast(query_BHTd.device.type, enabled=False):
            for part in _row_chunks(query_BHTd, key_BHSd):
                scores_BHTS = _scores(query_BHTd[:, :, part], key_BHSd, _seen(seen_BTS, part, batch), scaling)
                shown_BHTV = scores_BHTS.gather(3, _columns(batch, scores_BHTS))
                top_BHT1 = scores_BHTS.amax(dim=3, keepdim=True)
                mass_BHT1 = scores_BHTS.sub_(top_BHT1).exp_().sum(dim=3, keepdim=True)
                denominator_BHT1[:, :, part] = mass_BHT1.log_().add_(top_BHT1)
                shown_BHTV.sub_(denominator_BHT1[:, :, part]).exp_()
                torch.mul(shown_BHTV, _real(batch, part), out=attention_BHTV[:, :, part])
        ctx.save_for_backward(query_BHTd, key_BHSd, seen_BTS, denominator_BHT1, attention_BHTV)
        ctx.batch, ctx.scaling = batch, scaling
        return attention_BHTV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHTV: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """With p the probabilities: the score of each key changes by -p times the sum of gradient x p over the columns, and
        that of each column by its own gradient x p on top.
        """
        query_BHTd, key_BHSd, seen_BTS, denominator_BHT1, attention_BHTV = ctx.saved_tensors
        batch, query_grad_BHTd = ctx.batch, torch.empty_like(query_BHTd)
        key_grad_BHSd = torch.zeros_like(key_BHSd, dtype=torch.float32)
        with maybe_autocast(query_BHTd.device.type, enabled=False):
            for part in _row_chunks(query_BHTd, key_BHSd):
                moved_BHTV = grad_BHTV[:, :, part] * attention_BHTV[:, :, part]
                change_BHTS = _scores(query_BHTd[:, :, part], key_BHSd, _seen(seen_BTS, part, batch), ctx.scaling)
                change_BHTS.sub_(denominator_BHT1[:, :, part]).exp_().mul_(-moved_BHTV.sum(dim=3, keepdim=True))
                change_BHTS.scatter_add_(3, _columns(batch, change_BHTS), moved_BHTV)
                scaled_BHTS = change_BHTS.mul_(ctx.scaling).to(key_BHSd.dtype)
                query_grad_BHTd[:, :, part] = scaled_BHTS @ key_BHSd
                key_grad_BHSd += scaled_BHTS.transpose(2, 3) @ query_BHTd[:, :, part]
        return query_grad_BHTd, key_grad_BHSd.to(key_BHSd.dtype), None, None, None


def _row_chunks(query_BHTd: torch.Tensor, key_BHSd: torch.Tensor) -> Iterator[slice]:
    samples, heads, rows, _ = query_BHTd.shape
    chunk = max(1, _MAX_SCORES // (samples * heads * key_BHSd.shape[2]))
    return (slice(start, start + chunk) for start in range(0, rows, chunk))


def _seen(seen_BTS: torch.Tensor | None, part: slice, batch: Batch) -> torch.Tensor:
    """Positions that a chunk of rows sees, ``[B, T, S]`` of bool."""
    if seen_BTS is not None:
        return seen_BTS[:, part]
    key_position = torch.arange(batch.input_ids_BS.shape[1], device=batch.input_ids_BS.device)
    return (key_position <= batch.text_rows_BT[:, part, None]) & batch.attention_mask_BS[:, None, :]


def _scores(query_BHTd: torch.Tensor, key_BHSd: torch.Tensor, seen_BTS: torch.Tensor, scaling: float) -> torch.Tensor:
    """Scores of a chunk of rows in float32, -inf where a row does not see a position."""
    scores_BHTS = (query_BHTd @ key_BHSd.transpose(2, 3)).float().mul_(scaling)
    return scores_BHTS.masked_fill_(~seen_BTS[:, None], -torch.inf)


def _columns(batch: Batch, scores_BHTS: torch.Tensor) -> torch.Tensor:
    """Where the vision columns of each row are."""
    return batch.vision_columns_BV[:, None, None, :].expand(*scores_BHTS.shape[:3], -1)


def _real(batch: Batch, part: slice) -> torch.Tensor:
    """``[B, 1, T, V]`` of bool: neither row nor column is padding, and a row between two images does not see the later one."""
    row_BT1, column_B1V = batch.text_rows_BT[:, part, None], batch.vision_columns_BV[:, None, :]
    real_BTV = batch.text_mask_BT[:, part, None] & batch.vision_mask_BV[:, None, :] & (column_B1V <= row_BT1)
    return real_BTV[:, None]


AttentionInterface.register(_KERNEL, _attend)
AttentionMaskInterface.register(_KERNEL, sdpa_mask)
