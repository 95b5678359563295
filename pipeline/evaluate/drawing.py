"""Answers that are drawn at random, each from numbers of its own, so that neither its batch nor the process changes it.

Shapes: B answers of a batch, N most tokens of an answer, V vocabulary.
"""

import hashlib

import numpy as np
import torch
from transformers import LogitsProcessor, TopPLogitsWarper

_SHARES = 2**44
"""Probabilities are counted in this many shares: whole numbers, whose sums are the same in any order of adding them."""


def uniform_numbers(seed: int, key: str, number: int, count: int) -> np.ndarray:
    """``count`` numbers in [0, 1), float64, for answer ``number`` to the sample of a key; nothing else decides them.

    The first ones do not depend on ``count``.
    """
    digest = hashlib.sha256(f"{seed}|{key}|{number}".encode()).digest()
    # Raw words of a bit generator are stable over versions of numpy; distributions need not be.
    words: np.ndarray = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)
    return (words >> np.uint64(11)) * 2.0**-53


class DrawnTokens(LogitsProcessor):  # type: ignore[misc]  # the class is untyped
    """Leaves, at each step, the one token of each answer at which the sum of probabilities passes that answer's number.

    ``uniforms_BN``: in [0, 1). Tokens less likely than 2**-44 are never drawn. ``top_p``: from the likeliest tokens that make
    that share alone.
    """

    def __init__(self, uniforms_BN: np.ndarray, temperature: float, top_p: float = 1.0) -> None:
        self.uniforms_BN = torch.from_numpy(np.ascontiguousarray(uniforms_BN, dtype=np.float64))
        self.temperature = temperature
        self.top_p = TopPLogitsWarper(top_p) if top_p < 1 else None
        self.step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """transformers' hook: ``scores`` are ``[B, V]`` logits."""
        logits_BV = scores.float() / self.temperature
        if self.top_p is not None:
            logits_BV = self.top_p(input_ids, logits_BV)
        self.uniforms_BN = self.uniforms_BN.to(scores.device)
        uniform_B1 = self.uniforms_BN[:, self.step, None]
        self.step += 1
        sums_BV = (logits_BV.softmax(dim=-1).double() * _SHARES).long().cumsum(dim=-1)
        total_B1 = sums_BV[:, -1:]
        drawn_B1 = torch.minimum((uniform_B1 * total_B1).long(), total_B1 - 1)
        token_B1 = torch.searchsorted(sums_BV, drawn_B1, right=True).clamp_(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B1, 0.0)
