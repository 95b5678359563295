"""The code of cached log-probabilities of kept tokens, and its decoder in numpy, for reading a row without torch.

Stage two decodes the same codes on its device (:mod:`alignkd.targets.logits.kept`).

Shapes: A answers, K kept tokens, N vocabulary.
"""

import math

import numpy as np

LOWEST = -36.0
"""Smaller log-probabilities are stored as this: e^-36."""
LEVELS_PER_E = 12.0
"""Levels per factor of e."""
FINE = 0.3
"""Where levels begin to widen: at -x they are (x + 0.3) / 12 apart."""
LOWEST_CODE = round(math.log(1 - LOWEST / FINE) * LEVELS_PER_E)


def decode_kept(
    rank_steps_AK: np.ndarray, codes_AK: np.ndarray, tail_logmass_A: np.ndarray, id_of_rank_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids ``[A, K]`` int64 and log-probabilities ``[A, K]`` of kept tokens, and the log mass of all others ``[A]``, float32.

    Together they sum to one, as in :meth:`alignkd.targets.logits.topk.TopK.kept`.
    """
    ids_AK = id_of_rank_N[rank_steps_AK.astype(np.int64).cumsum(axis=1)].astype(np.int64)
    logprobs_AK = (1 - np.exp(codes_AK.astype(np.float32) / np.float32(LEVELS_PER_E))) * np.float32(FINE)
    tail_A = tail_logmass_A.astype(np.float32)
    total_A = np.logaddexp(np.logaddexp.reduce(logprobs_AK, axis=1), tail_A)
    return ids_AK, logprobs_AK - total_A[:, None], tail_A - total_A
