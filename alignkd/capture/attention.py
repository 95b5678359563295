"""One forward pass: text-to-vision attention of the first layer or others, vision tokens, hidden states at answers.

1. The vision tower (frozen) and the projector give the vision tokens.
2. The decoder runs with its own attention kernel (:mod:`alignkd.capture.kernel`); in the requested layers this also gives the
   probabilities of text rows (after the image) and vision columns, with the exact softmax denominator.
3. The last hidden states are gathered at the positions that predict a supervised token; logits exist for these alone.

Everything is differentiable. ``output_attentions`` would instead keep every layer's [H, S, S] and the slow kernel.

Shapes: B samples, S positions, H heads, T text rows, V vision columns, N images, A answers, D model width.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from alignkd.capture.kernel import TAP, Tap, use_tapped_kernel
from alignkd.capture.own_forward import check_own_forward
from alignkd.errors import CheckpointError
from alignkd.inputs.batch import Batch
from alignkd.models.vlm import Vision, Vlm


@dataclass
class Captured:
    """What one forward pass gave.

    ``attention``: of each layer that was asked for, float32 probabilities ``[B, H, T, V]``, zero where padded.
    ``vision_BVD``: vision tokens, zero where padded.
    ``hidden_AD``: last hidden states (after the final norm) at answer positions, times :attr:`Vlm.logit_scale`: the output
    head over them gives the model's own logits.
    """

    attention: Mapping[int, torch.Tensor]
    vision_BVD: torch.Tensor
    hidden_AD: torch.Tensor


def enable_capture(vlm: Vlm) -> None:
    """Let the language model's attention be recorded, and compare the model with itself as it is without us, once.

    The model's outputs are unchanged. Where its own logits are those of the head times a number, :attr:`Vlm.logit_scale` is
    that number from here on.

    Raises:
        CheckpointError: its attention is no plain softmax of scaled scores, its logits are no linear map of hidden states, or
            what is captured differs from what the model itself computes by more than rounding.
    """
    if vlm.captures:
        return
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

    def run(batch: Batch, tap: Tap) -> torch.Tensor:
        return _decode(vlm, batch, vlm.encode_images(batch), tap)

    use_tapped_kernel(vlm)
    vlm.logit_scale = check_own_forward(vlm, run)
    vlm.captures = True


def capture(
    vlm: Vlm, batch: Batch, *, attention: bool = True, layers: Collection[int] = (0,), vision: Vision | None = None
) -> Captured:
    """Run the model once over a batch and record what Align-KD compares; with ``attention``, that of these ``layers``.

    ``vision``: the batch's vision tokens, where they are there already and it carries no images.

    Raises:
        CheckpointError: the attention of one of the layers cannot be captured.
    """
    enable_capture(vlm)
    vision = vlm.encode_images(batch) if vision is None else vision
    wanted = frozenset(layers) if attention else frozenset()
    tap = Tap(batch, wanted) if wanted and has_attention(batch) else None
    hidden_AD = _decode(vlm, batch, vision, tap)
    hidden_AD = hidden_AD if vlm.logit_scale == 1 else hidden_AD * vlm.logit_scale
    found = dict.fromkeys(wanted, no_attention(batch, vlm.heads)) if tap is None else tap.found
    if missing := wanted - found.keys():
        raise CheckpointError(
            f"{vlm.folder}: no attention of layer {min(missing)} can be captured: there is no such layer, or its"
            " attention is no softmax"
        )
    vision_BVD = by_sample(None if vision is None else vision.tokens_MD, batch, vlm.hidden_size, vlm.dtype)
    return Captured(found, vision_BVD, hidden_AD)


def _decode(vlm: Vlm, batch: Batch, vision: Vision | None, tap: Tap | None) -> torch.Tensor:
    """Last hidden states at answers, ``[A, D]``; the tap records the attention of its layers."""
    # An argument of the call, so that gradient checkpointing, which runs the layer again during backward, repeats the same
    # operations, and no later call does.
    hidden_BSD = vlm.decode(batch, vision, **({} if tap is None else {TAP: tap}))
    return hidden_BSD.flatten(0, 1).index_select(0, batch.answer_positions_A)


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
