"""One batch of questions to ids of answers: greedy or sampled, and handed on token by token where that is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from alignkd.inputs.batch import ModelInput
from alignkd.models.vlm import Vlm
from alignkd.pipeline.evaluate.drawing import DrawnTokens


@dataclass(frozen=True)
class Decoding:
    """How answers are generated. ``temperature`` 0: greedily; else sampled from the likeliest tokens that make ``top_p``."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0

    @property
    def settings(self) -> dict[str, Any]:
        """For ``model.generate``. What a checkpoint's own generation settings say of sampling does not count."""
        about: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "num_beams": 1, "do_sample": self.temperature > 0}
        about["use_cache"] = True  # what a checkpoint says was meant for its training
        if self.temperature > 0:
            about |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return about

    def drawing(self, uniforms_BN: np.ndarray | None) -> dict[str, Any]:
        """As :attr:`settings`; with random numbers of its own for each answer of a batch, ``[B, max_new_tokens]`` in [0, 1)."""
        if uniforms_BN is None or not self.temperature:
            return self.settings
        chosen = DrawnTokens(uniforms_BN, self.temperature, self.top_p)
        # The processor leaves one token, which greedy decoding then takes.
        return {**Decoding(self.max_new_tokens).settings, "logits_processor": [chosen]}


@torch.no_grad()
def generate_ids(
    vlm: Vlm,
    questions: Sequence[ModelInput],
    decoding: Decoding,
    streamer: Any = None,
    uniforms_BN: np.ndarray | None = None,
) -> list[list[int]]:
    """Ids of each answer, up to and with what ends it. ``streamer``: gets the ids of a single question as they come.

    Random numbers are those of torch's own generator, or ``uniforms_BN``: see :meth:`Decoding.drawing`. Tensors made here may
    stay with a model that is trained afterwards, so they are not those of torch's inference mode.
    """
    # Padded on the left, so that generation continues the prompt.
    batch = vlm.collate(questions, pad_left=True).to(vlm.device)
    output = vlm.model.generate(
        input_ids=batch.input_ids_BS,
        attention_mask=batch.attention_mask_BS.long(),
        **vlm.generation_inputs(batch),
        **decoding.drawing(uniforms_BN),
        eos_token_id=vlm.end_token_ids,
        pad_token_id=vlm.pad_token_id,
        **({} if streamer is None else {"streamer": streamer}),
    )
    return [up_to_end(ids, vlm.end_token_ids) for ids in output[:, batch.input_ids_BS.shape[1] :].tolist()]


def up_to_end(ids: list[int], end_token_ids: Sequence[int]) -> list[int]:
    """Ids without those behind the first end token, which pad a batch."""
    ends = [position for position, token in enumerate(ids) if token in end_token_ids]
    return ids[: ends[0] + 1] if ends else ids


def texts_of(vlm: Vlm, answers: Sequence[list[int]]) -> list[str]:
    """The text of each answer; ids that several have, as short answers do, become text once."""
    texts = {ids: vlm.answer_text(list(ids)) for ids in set(map(tuple, answers))}
    return [texts[tuple(ids)] for ids in answers]
