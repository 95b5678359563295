"""Divergences of a student from logit targets, by autograd through whole rows of logits.

:mod:`alignkd.losses.answer_loss` computes the same with gradients written by hand, a chunk of answers at a time.

Shapes: A answers, K kept tokens, J draws, N vocabulary, X outcomes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from alignkd.targets.logit_levels import FINE, LEVELS_PER_E, LOWEST
from alignkd.targets.logits import LogitCodec
from alignkd.targets.logits.dense import Hidden, Sketched
from alignkd.targets.logits.kept import decode_ids, decode_logprobs
from alignkd.targets.logits.topk import Sampled, TopK
from tests.reference.divergences import DIVERGENCES

Values = Mapping[str, torch.Tensor]


def divergence(codec: LogitCodec, name: str, logits_AN: torch.Tensor, values: Values, temperature: float) -> torch.Tensor:
    """The divergence called ``name`` of the student's logits from the targets, ``[A]``; forward KL of draws from the draws."""
    if name != "forward_kl" or not isinstance(codec, Sampled):
        return DIVERGENCES[name](*outcomes(codec, logits_AN, values, temperature))
    ids_AK, logprobs_AK, tail_A = codec.kept(values)
    ids_AJ = decode_ids(values["draw_rank_steps"], codec.id_of_rank)
    drawn_AJ = decode_logprobs(values["draw_logprob_codes"])
    student_AN = at_temperature(logits_AN, temperature)
    kept_A = (logprobs_AK.exp() * (logprobs_AK - student_AN.gather(1, ids_AK))).sum(dim=1)
    return kept_A + tail_A.exp() * (drawn_AJ - student_AN.gather(1, ids_AJ)).mean(dim=1)


def outcomes(
    codec: LogitCodec, logits_AN: torch.Tensor, values: Values, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of student and teacher, ``[A, X]`` each: of the whole vocabulary, or of known tokens and one bucket."""
    student_AN = at_temperature(logits_AN, temperature)
    if isinstance(codec, Hidden):
        teacher_AN = torch.nn.functional.linear(
            values["hidden"].to(codec.output_head.dtype), codec.output_head, codec.output_bias
        )
        return student_AN, at_temperature(teacher_AN, temperature)
    if isinstance(codec, Sketched):
        ids_AK, logprobs_AK, tail_A = codec.kept(values)
        tail_AN = (codec.sketch.decoder()(values["sketch"]) / temperature).scatter(1, ids_AK, -torch.inf)
        tail_AN = tail_AN + (tail_A - tail_AN.logsumexp(dim=1))[:, None]
        return student_AN, tail_AN.scatter(1, ids_AK, logprobs_AK)
    # Where every token is kept there was nothing to draw from.
    if isinstance(codec, Sampled) and values["topk_rank_steps"].shape[1] < logits_AN.shape[1]:
        ids_AX, logprobs_AX, left_A = codec.known(values)
        student_AX, teacher_AX = bucketed(student_AN, ids_AX, logprobs_AX, left_A)
        return student_AX.masked_fill(teacher_AX == -torch.inf, -torch.inf), teacher_AX
    if isinstance(codec, TopK):
        return bucketed(student_AN, *codec.kept(values))
    known = codec.teacher(values)(slice(None))
    return bucketed(student_AN, known.ids_AX, known.logprobs_AX, known.tail_A)


def at_temperature(logits_AN: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities; half precision is computed in float32."""
    if logits_AN.dtype in (torch.bfloat16, torch.float16):
        logits_AN = logits_AN.float()
    return (logits_AN / temperature).log_softmax(dim=1)


def bucketed(
    student_AN: torch.Tensor, ids_AK: torch.Tensor, logprobs_AK: torch.Tensor, tail_A: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outcomes of student and teacher: the tokens of ``ids_AK``, and one bucket for all others, if there are any."""
    student_AK = student_AN.gather(1, ids_AK)
    if ids_AK.shape[1] == student_AN.shape[1]:
        return student_AK, logprobs_AK
    bucket_A = student_AN.scatter(1, ids_AK, -torch.inf).logsumexp(dim=1)
    return torch.cat([student_AK, bucket_A[:, None]], dim=1), torch.cat([logprobs_AK, tail_A[:, None]], dim=1)


def logprob_error(logprobs: torch.Tensor) -> torch.Tensor:
    """Worst case of |decoded - logprobs|: half a level to either side, and what lies below the lowest."""
    half_level = math.exp(0.5 / LEVELS_PER_E) - 1
    return (FINE - logprobs.clamp(LOWEST, 0.0)) * half_level + (LOWEST - logprobs).clamp(min=0) + 1e-5
