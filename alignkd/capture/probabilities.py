"""Attention probabilities of text rows and vision columns, from queries and keys, a chunk of rows at a time.

Shapes: B samples, S positions, H heads, G 1 or H, d head width, T text rows, V vision columns.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers.utils.generic import maybe_autocast

from alignkd.inputs.batch import Batch

_MAX_SCORES = 2**24
"""Scores in memory at a time (64 MB in float32): longer prompts are captured in chunks of rows."""


def text_to_vision(
    query_BHTd: torch.Tensor,
    key_BHSd: torch.Tensor,
    batch: Batch,
    scaling: float,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention probabilities of text rows and vision columns, ``[B, H, T, V]`` in float32, zero where padded.

    Queries are those of the text rows alone, keys those of all positions: the softmax denominator is exact.
    ``attention_mask``: True where a row attends to a position, or numbers to add to the scores, ``[B or 1, G, S, S]``;
    None: each row attends to all up to itself.
    """
    visible_BGTS = None
    if attention_mask is not None:
        groups, positions = attention_mask.shape[1], attention_mask.shape[3]
        row_BGTS = batch.text_rows_BT[:, None, :, None].expand(-1, groups, -1, positions)
        visible_BGTS = attention_mask.expand(batch.samples, -1, -1, -1).gather(2, row_BGTS)
    kind = query_BHTd.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        query_BHTd, key_BHSd = query_BHTd.to(dtype), key_BHSd.to(dtype)
    attention_BHTV: torch.Tensor = _TextToVision.apply(query_BHTd, key_BHSd, visible_BGTS, batch, scaling)  # type: ignore[no-untyped-call]
    return attention_BHTV


class _TextToVision(torch.autograd.Function):
    """Rows in chunks: scores of all keys exist for one chunk at a time, in either pass, and not in between."""

    @staticmethod
    def forward(
        ctx: Any,
        query_BHTd: torch.Tensor,
        key_BHSd: torch.Tensor,
        visible_BGTS: torch.Tensor | None,
        batch: Batch,
        scaling: float,
    ) -> torch.Tensor:
        samples, heads, rows, _ = query_BHTd.shape
        attention_BHTV = query_BHTd.new_empty(samples, heads, rows, batch.vision_columns_BV.shape[1], dtype=torch.float32)
        denominator_BHT1 = attention_BHTV.new_empty(samples, heads, rows, 1)
        with maybe_autocast(query_BHTd.device.type, enabled=False):
            for part in _row_chunks(query_BHTd, key_BHSd):
                scores_BHTS = _scores(query_BHTd[:, :, part], key_BHSd, _visible(visible_BGTS, part, batch), scaling)
                columns_BHTV = scores_BHTS.gather(3, _columns(batch, scores_BHTS))
                top_BHT1 = scores_BHTS.amax(dim=3, keepdim=True)
                mass_BHT1 = scores_BHTS.sub_(top_BHT1).exp_().sum(dim=3, keepdim=True)
                denominator_BHT1[:, :, part] = mass_BHT1.log_().add_(top_BHT1)
                columns_BHTV.sub_(denominator_BHT1[:, :, part]).exp_()
                torch.mul(columns_BHTV, _not_padding(batch, part), out=attention_BHTV[:, :, part])
        ctx.save_for_backward(query_BHTd, key_BHSd, visible_BGTS, denominator_BHT1, attention_BHTV)
        ctx.batch, ctx.scaling = batch, scaling
        return attention_BHTV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHTV: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """With p the probabilities: the gradient of each key's score is -p times the sum of gradient x p over the columns; that
        of a column has its own gradient x p in addition.
        """
        query_BHTd, key_BHSd, visible_BGTS, denominator_BHT1, attention_BHTV = ctx.saved_tensors
        batch, query_grad_BHTd = ctx.batch, torch.empty_like(query_BHTd)
        key_grad_BHSd = torch.zeros_like(key_BHSd, dtype=torch.float32)
        with maybe_autocast(query_BHTd.device.type, enabled=False):
            for part in _row_chunks(query_BHTd, key_BHSd):
                weighted_BHTV = grad_BHTV[:, :, part] * attention_BHTV[:, :, part]
                change_BHTS = _scores(query_BHTd[:, :, part], key_BHSd, _visible(visible_BGTS, part, batch), ctx.scaling)
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


def _visible(visible_BGTS: torch.Tensor | None, part: slice, batch: Batch) -> torch.Tensor:
    """Positions that the rows of a chunk attend to, or numbers to add to their scores, ``[B, G, T, S]``."""
    if visible_BGTS is not None:
        return visible_BGTS[:, :, part]
    key_position = torch.arange(batch.input_ids_BS.shape[1], device=batch.input_ids_BS.device)
    return ((key_position <= batch.text_rows_BT[:, part, None]) & batch.attention_mask_BS[:, None, :])[:, None]


def _scores(query_BHTd: torch.Tensor, key_BHSd: torch.Tensor, visible_BGTS: torch.Tensor, scaling: float) -> torch.Tensor:
    """Scores of a chunk of rows in float32, -inf where a row does not attend to a position."""
    scores_BHTS = (query_BHTd @ key_BHSd.transpose(2, 3)).float().mul_(scaling)
    if visible_BGTS.dtype == torch.bool:
        return scores_BHTS.masked_fill_(~visible_BGTS, -torch.inf)
    return scores_BHTS.add_(visible_BGTS)


def _columns(batch: Batch, scores_BHTS: torch.Tensor) -> torch.Tensor:
    """The positions of the vision columns, for each row."""
    return batch.vision_columns_BV[:, None, None, :].expand(*scores_BHTS.shape[:3], -1)


def _not_padding(batch: Batch, part: slice) -> torch.Tensor:
    """``[B, 1, T, V]`` of bool: False at padding, and where a row between two images would look at the later one."""
    row_BT1, column_B1V = batch.text_rows_BT[:, part, None], batch.vision_columns_BV[:, None, :]
    kept_BTV = batch.text_mask_BT[:, part, None] & batch.vision_mask_BV[:, None, :] & (column_B1V <= row_BT1)
    return kept_BTV[:, None]


def of_whole(attention_BHSS: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The same of a kernel that gives all of its probabilities, ``[B, H, T, V]`` in float32."""
    row_BHTS = batch.text_rows_BT[:, None, :, None].expand(-1, attention_BHSS.shape[1], -1, attention_BHSS.shape[3])
    rows_BHTS = attention_BHSS.gather(2, row_BHTS).float()
    return rows_BHTS.gather(3, _columns(batch, rows_BHTS)) * _not_padding(batch, slice(None))
