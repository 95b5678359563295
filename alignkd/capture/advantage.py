"""How much of each answer token the teacher takes from the image: the advantage of VA-OPD (arXiv 2605.21924).

``a_t = max(log p(y_t | image) - log p(y_t | destroyed image), 0)``, over the teacher's whole vocabulary, at temperature 1.

Shapes: A answers, D width, N vocabulary, M answers of the samples with an image.
"""

import torch

from alignkd.capture.attention import capture
from alignkd.inputs.batch import Batch
from alignkd.models.vlm import Vlm

LARGEST = 32.0
"""Nats; larger advantages count as this, which is the most that a cache stores."""

_LOGITS_AT_ONCE = 2**25
"""Logits in memory at a time."""


def advantages(vlm: Vlm, batch: Batch, hidden_AD: torch.Tensor) -> torch.Tensor:
    """The advantage of each answer token, float32 ``[A]``, by one more pass over the samples that have an image.

    ``hidden_AD``: what the first pass gave for the answers. Zero for samples without an image: where no sample of the batch has
    one, there is no pass. Not finite where one of the two log-probabilities is not.
    """
    return gains(vlm, batch, hidden_AD).clamp(0, LARGEST)


def gains(vlm: Vlm, batch: Batch, hidden_AD: torch.Tensor) -> torch.Tensor:
    """As :func:`advantages`, with its sign and without a limit: negative where the token is likelier with a destroyed image."""
    if batch.destroyed is None or not len(hidden_AD):
        return torch.zeros(len(hidden_AD), device=hidden_AD.device)
    blind_MD = capture(vlm, batch.destroyed, attention=False).hidden_AD
    blind_M = answer_logprobs(vlm, blind_MD, batch.destroyed.answer_ids_A)
    has_image_A = batch.samples_with_image()[batch.answer_samples_A]
    # The answers of samples with an image are those of the second pass, in their order. A zero, for none at all.
    place_A = (has_image_A.cumsum(0) - 1).clamp(min=0)
    blind_A = torch.cat([blind_M, blind_M.new_zeros(1)])[place_A]
    gained_A = answer_logprobs(vlm, hidden_AD, batch.answer_ids_A) - blind_A
    return gained_A.masked_fill(~has_image_A, 0.0)


def answer_logprobs(vlm: Vlm, hidden_AD: torch.Tensor, answer_ids_A: torch.Tensor) -> torch.Tensor:
    """The log-probability of each answer token, float32 ``[A]``; logits are computed a chunk of answers at a time."""
    rows, found = max(1, _LOGITS_AT_ONCE // vlm.vocabulary), [torch.zeros(0, device=hidden_AD.device)]
    for part_AD, ids_A in zip(torch.split(hidden_AD, rows), torch.split(answer_ids_A, rows), strict=True):
        logits_AN = vlm.head(part_AD).float()
        found.append(logits_AN.gather(1, ids_A[:, None])[:, 0] - logits_AN.logsumexp(dim=1))
    return torch.cat(found)
