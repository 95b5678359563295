"""One forward pass: text-to-vision attention of the first layer or others, vision tokens, hidden states at answers.

1. The vision tower (frozen) and the projector give the vision tokens.
2. The decoder runs with an attention function that is the fast kernel in every layer; in the requested layers it also computes
   the probabilities of text rows (after the image) and vision columns, with the exact softmax denominator.
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

from alignkd.errors import CheckpointError
from alignkd.inputs.batch import Batch
from alignkd.models.vlm import Vlm

_KERNEL = "alignkd_capture"
_MAX_SCORES = 2**24
"""Scores in memory at a time (64 MB in float32): longer prompts are captured in chunks of rows."""


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
    """A request for the attention of some layers, and what was found, ``[B, H, T, V]`` each."""

    batch: Batch
    layers: frozenset[int]
    found: dict[int, torch.Tensor] = field(default_factory=dict)


def enable_capture(vlm: Vlm) -> None:
    """Let the language model's attention go through the capturing kernel; outputs are unchanged.

    Raises:
        CheckpointError: its attention is no plain softmax of scaled scores, or its logits are no linear map of hidden states.
    """
    text = vlm.text_config
    if (cap := getattr(text, "attn_logit_softcapping", None)) is not None:
        raise CheckpointError(
            f"{vlm.folder}: its attention scores are capped at {cap} (attn_logit_softcapping), which no fast kernel supports;"
            " use a model whose configuration has no cap"
        )
    if (cap := getattr(text, "final_logit_softcapping", None)) is not None:
        raise CheckpointError(
            f"{vlm.folder}: its logits are capped at {cap} (final_logit_softcapping), but the losses compute logits from hidden"
            " states and the output head alone; use a model whose configuration has no cap"
        )
    if text._attn_implementation != _KERNEL:
        vlm.model.set_attn_implementation({"text_config": _KERNEL})


def capture(vlm: Vlm, batch: Batch, *, attention: bool = True, layers: Collection[int] = (0,)) -> Captured:
    """Run the model once over a batch and record what Align-KD compares; with ``attention``, that of these ``layers``.

    Raises:
        CheckpointError: the attention of one of the layers cannot be captured.
    """
    vision = vlm.encode_images(batch)
    wanted = frozenset(layers) if attention else frozenset()
    tap = _Tap(batch, wanted) if wanted and has_attention(batch) else None
    if tap is not None:
        enable_capture(vlm)
    # An argument of the call, so that gradient checkpointing, which runs the layer again during backward, repeats the same
    # operations, and no later call does.
    hidden_BSD = vlm.decode(batch, vision, **({} if tap is None else {"alignkd_tap": tap}))
    found = dict.fromkeys(wanted, no_attention(batch, vlm.heads)) if tap is None else tap.found
    if missing := wanted - found.keys():
        raise CheckpointError(
            f"{vlm.folder}: no attention of layer {min(missing)} can be captured: there is no such layer, or its"
            " attention is no softmax"
        )
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
    ``attention_mask``: True where a row attends to a position, ``[B, 1, S, S]``; None: each row attends to all up to itself.
    """
    visible_BTS = None
    if attention_mask is not None:
        assert attention_mask.dtype == torch.bool, "the mask function of this kernel gives booleans"
        row_BTS = batch.text_rows_BT[:, :, None].expand(-1, -1, attention_mask.shape[3])
        visible_BTS = attention_mask[:, 0].expand(batch.samples, -1, -1).gather(1, row_BTS)
    kind = query_BHTd.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        query_BHTd, key_BHSd = query_BHTd.to(dtype), key_BHSd.to(dtype)
    attention_BHTV: torch.Tensor = _TextToVision.apply(query_BHTd, key_BHSd, visible_BTS, batch, scaling)  # type: ignore[no-untyped-call]
    return attention_BHTV


class _TextToVision(torch.autograd.Function):
    """Rows in chunks: scores of all keys exist for one chunk at a time, in either pass, and not in between."""

    @staticmethod
    def forward(
        ctx: Any,
        query_BHTd: torch.Tensor,
        key_BHSd: torch.Tensor,
        visible_BTS: torch.Tensor | None,
        batch: Batch,
        scaling: float,
    ) -> torch.Tensor:
        samples, heads, rows, _ = query_BHTd.shape
        attention_BHTV = query_BHTd.new_empty(samples, heads, rows, batch.vision_columns_BV.shape[1], dtype=torch.float32)
        denominator_BHT1 = attention_BHTV.new_empty(samples, heads, rows, 1)
        with maybe_autocast(query_BHTd.device.type, enabled=False):
            for part in _row_chunks(query_BHTd, key_BHSd):
                scores_BHTS = _scores(query_BHTd[:, :, part], key_BHSd, _visible(visible_BTS, part, batch), scaling)
                columns_BHTV = scores_BHTS.gather(3, _columns(batch, scores_BHTS))
                top_BHT1 = scores_BHTS.amax(dim=3, keepdim=True)
                mass_BHT1 = scores_BHTS.sub_(top_BHT1).exp_().sum(dim=3, keepdim=True)
                denominator_BHT1[:, :, part] = mass_BHT1.log_().add_(top_BHT1)
                columns_BHTV.sub_(denominator_BHT1[:, :, part]).exp_()
                torch.mul(columns_BHTV, _not_padding(batch, part), out=attention_BHTV[:, :, part])
        ctx.save_for_backward(query_BHTd, key_BHSd, visible_BTS, denominator_BHT1, attention_BHTV)
        ctx.batch, ctx.scaling = batch, scaling
        return attention_BHTV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHTV: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """With p the probabilities: the gradient of each key's score is -p times the sum of gradient x p over the columns; that
        of a column has its own gradient x p in addition.
        """
        query_BHTd, key_BHSd, visible_BTS, denominator_BHT1, attention_BHTV = ctx.saved_tensors
        batch, query_grad_BHTd = ctx.batch, torch.empty_like(query_BHTd)
        key_grad_BHSd = torch.zeros_like(key_BHSd, dtype=torch.float32)
        with maybe_autocast(query_BHTd.device.type, enabled=False):
            for part in _row_chunks(query_BHTd, key_BHSd):
                weighted_BHTV = grad_BHTV[:, :, part] * attention_BHTV[:, :, part]
                change_BHTS = _scores(query_BHTd[:, :, part], key_BHSd, _visible(visible_BTS, part, batch), ctx.scaling)
                change_BHTS.sub_(denominator_BHT1[:, :, part]).exp_().mul_(-weighted_BHTV.sum(dim=3, keepdim=True))
                change_BHTS.scatter_add_(3, _columns(batch, change_BHTS), weighted_BHTV)
                scaled_BHTS = change_BHTS.mul_(ctx.scaling).to(key_BHSd.dtype)
                query_grad_BHTd[:, :, part] = scaled_BHTS @ key_BHSd
                key_grad_BHSd += scaled_BHTS.transpose(2, 3) @ query_BHTd[:, :, part]
        return query_grad_BHTd, key_grad_BHSd.to(key_BHSd.dtype), None, None, None


def _row_chunks(query_BHTd: torch.Tensor, key_BHSd: torch.Tensor) -> Iterator[slice]:
    samples, heads, rows, _ = query_BHTd.shape
    chunk = max(1, _MAX_SCORES // (samples * heads * key_BHSd.shape[2]))
    return (slice(start, start + chunk) for start in range(0, rows, chunk))


def _visible(visible_BTS: torch.Tensor | None, part: slice, batch: Batch) -> torch.Tensor:
    """Positions that the rows of a chunk attend to, ``[B, T, S]`` of bool."""
    if visible_BTS is not None:
        return visible_BTS[:, part]
    key_position = torch.arange(batch.input_ids_BS.shape[1], device=batch.input_ids_BS.device)
    return (key_position <= batch.text_rows_BT[:, part, None]) & batch.attention_mask_BS[:, None, :]


def _scores(query_BHTd: torch.Tensor, key_BHSd: torch.Tensor, visible_BTS: torch.Tensor, scaling: float) -> torch.Tensor:
    """Scores of a chunk of rows in float32, -inf where a row does not attend to a position."""
    scores_BHTS = (query_BHTd @ key_BHSd.transpose(2, 3)).float().mul_(scaling)
    return scores_BHTS.masked_fill_(~visible_BTS[:, None], -torch.inf)


def _columns(batch: Batch, scores_BHTS: torch.Tensor) -> torch.Tensor:
    """The positions of the vision columns, for each row."""
    return batch.vision_columns_BV[:, None, None, :].expand(*scores_BHTS.shape[:3], -1)


def _not_padding(batch: Batch, part: slice) -> torch.Tensor:
    """``[B, 1, T, V]`` of bool: False at padding, and where a row between two images would look at the later one."""
    row_BT1, column_B1V = batch.text_rows_BT[:, part, None], batch.vision_columns_BV[:, None, :]
    kept_BTV = batch.text_mask_BT[:, part, None] & batch.vision_mask_BV[:, None, :] & (column_B1V <= row_BT1)
    return kept_BTV[:, None]


AttentionInterface.register(_KERNEL, _attend)
AttentionMaskInterface.register(_KERNEL, sdpa_mask)
