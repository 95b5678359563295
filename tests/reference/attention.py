"""Where the parameters are that captured attention depends on."""

from __future__ import annotations

from torch import nn

from alignkd.models.vlm import Vlm


def first_attention(vlm: Vlm) -> nn.Module:
    """The attention module of the first decoder layer."""
    module: nn.Module = vlm.decoder.layers[0].self_attn
    return module
