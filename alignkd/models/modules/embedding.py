"""Vision tokens inserted among token embeddings, and a decoder run over both.

Shapes: B samples, S positions, M vision tokens of a batch, D width of the language model.
"""

from typing import Any

import torch
from torch import nn

from alignkd.inputs.batch import Batch
from alignkd.models.vlm import Vision


class PlaceholderEmbedding(nn.Embedding):
    """An embedding that accepts a placeholder below zero, whose rows are overwritten by vision tokens afterwards."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embed ids."""
        return super().forward(input_ids.clamp(min=0))


def insert(embeddings_BSD: torch.Tensor, tokens_MD: torch.Tensor | None, positions_M: torch.Tensor) -> torch.Tensor:
    """Vision tokens at positions of a flattened ``[B * S]``, which are known on the host: nothing waits for the device."""
    if tokens_MD is None:
        return embeddings_BSD
    flat = embeddings_BSD.flatten(0, 1).index_copy(0, positions_M, tokens_MD.to(embeddings_BSD.dtype))
    return flat.view_as(embeddings_BSD)


def run_decoder(embedding: Any, decoder: Any, batch: Batch, vision: Vision | None, **kwargs: Any) -> torch.Tensor:
    """Last hidden states ``[B, S, D]`` of a batch's ids and ready vision tokens; ``kwargs`` go to each layer's attention."""
    tokens_MD = None if vision is None else vision.tokens_MD
    embeddings_BSD = insert(embedding(batch.input_ids_BS), tokens_MD, batch.vision_positions)
    output = decoder(inputs_embeds=embeddings_BSD, attention_mask=batch.attention_mask_BS.long(), use_cache=False, **kwargs)
    hidden_BSD: torch.Tensor = output.last_hidden_state
    return hidden_BSD
