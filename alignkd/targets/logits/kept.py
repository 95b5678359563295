"""Tokens whose log-probability is kept: chosen, coded as small integers, and decoded on the device.

Ids are stored as ranks in the order of the teacher's mean probability, which a calibration estimates once per cache. Kept ranks
are sorted and stored as steps from one to the next: frequent tokens come first, so that the steps are small and compress well.
Log-probabilities are stored in 59 levels, fine near zero, where they matter most, and coarse far below.

Shapes: A answers, K kept tokens, N vocabulary, M calibration answers.
"""

import torch

from alignkd.targets.logit_levels import FINE, LEVELS_PER_E, LOWEST


def rank_order(mean_probability_N: torch.Tensor) -> torch.Tensor:
    """Token ids, likeliest first (``[N]``, int32); equal probabilities in the order of ids."""
    return mean_probability_N.argsort(descending=True, stable=True).to(torch.int32)


def choose(logprobs_AN: torch.Tensor, k: int, label_ids_A: torch.Tensor) -> torch.Tensor:
    """Ids of the k likeliest tokens of each answer; the label takes the place of the last one where it is not among them."""
    ids_AK = logprobs_AN.topk(min(k, logprobs_AN.shape[1]), dim=1).indices
    held_A = (ids_AK == label_ids_A[:, None]).any(dim=1)
    ids_AK[:, -1] = torch.where(held_A, ids_AK[:, -1], label_ids_A)
    return ids_AK


def encode_ids(ids_AK: torch.Tensor, rank_of_id_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps between sorted ranks (``[A, K]``), and the order of the ids (``[A, K]``)."""
    ranks_AK, order_AK = rank_of_id_N[ids_AK].sort(dim=1, stable=True)
    first_A1 = torch.zeros_like(ranks_AK[:, :1])
    return torch.diff(ranks_AK, dim=1, prepend=first_A1), order_AK


def decode_ids(steps_AK: torch.Tensor, id_of_rank_N: torch.Tensor) -> torch.Tensor:
    """Token ids (int64) from steps of any integer type."""
    return id_of_rank_N[steps_AK.long().cumsum(dim=1)].long()


def encode_logprobs(logprobs_AK: torch.Tensor) -> torch.Tensor:
    """uint8 codes: the nearest level."""
    return ((1 - logprobs_AK.clamp(LOWEST, 0.0) / FINE).log() * LEVELS_PER_E).round().to(torch.uint8)


def decode_logprobs(codes_AK: torch.Tensor) -> torch.Tensor:
    """float32 log-probabilities."""
    return (1 - (codes_AK.float() / LEVELS_PER_E).exp()) * FINE


def renormalise(topk_logprobs_AK: torch.Tensor, tail_logmass_A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo the rounding of stored log-probabilities: kept tokens and tail together sum to one again.

    Nothing is dropped: the tail keeps its share. A divergence between two distributions is then never negative.
    """
    total_A = torch.cat([topk_logprobs_AK, tail_logmass_A[:, None]], dim=1).logsumexp(dim=1)
    return topk_logprobs_AK - total_A[:, None], tail_logmass_A - total_A
