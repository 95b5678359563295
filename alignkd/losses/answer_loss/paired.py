"""The answer terms of a batch of which some answers may have no target from the teacher.

Shapes: A answers, P of them with a target, U without; D width, N vocabulary.
"""

from collections.abc import Mapping, Sequence

import torch

from alignkd.losses.answer_loss.chunk import SUPERVISED
from alignkd.losses.answer_loss.fused import AnswerTerms, answer_terms
from alignkd.losses.contract import TermInputs
from alignkd.losses.token_weights import recipe_token_weights


def batch_answer_terms(
    inputs: TermInputs,
    head_ND: torch.Tensor,
    bias_N: torch.Tensor | None,
    *,
    weights: Mapping[str, float],
    divisor: float,
) -> AnswerTerms:
    """The supervised term and the divergences of the recipe; answers without a target count in the supervised term alone.

    ``weights`` in the loss, by term; each term is a sum over answers over ``divisor``. Where the recipe weights tokens, the
    divergences have their weights, the supervised term has not.
    """
    targets, recipe = inputs.targets, inputs.recipe
    by_token_P = divergence_token_weights(inputs)

    def terms_of(hidden_XD: torch.Tensor, answer_ids_X: torch.Tensor, wanted: Mapping[str, float]) -> AnswerTerms:
        return answer_terms(
            hidden_XD,
            head_ND,
            answer_ids_X,
            weights=wanted,
            codec=inputs.logit_codec,
            values=targets.answers if len(wanted) > 1 else {},
            temperature=recipe.temperature,
            divisor=divisor,
            bias_N=bias_N,
            token_weights_A=by_token_P if len(wanted) > 1 else None,
        )

    hidden_AD, answer_ids_A = inputs.student_hidden_AD, inputs.batch.answer_ids_A
    supervised = {SUPERVISED: weights[SUPERVISED]}
    every = supervised | {name: weights[name] for name in recipe.divergences}
    if targets.paired_P is None or targets.unpaired_U is None or len(every) == 1:
        return terms_of(hidden_AD, answer_ids_A, every)
    parts = ((targets.paired_P, every), (targets.unpaired_U, supervised))
    return _joined(
        [terms_of(hidden_AD[chosen], answer_ids_A[chosen], wanted) for chosen, wanted in parts], [c for c, _ in parts]
    )


def divergence_token_weights(inputs: TermInputs) -> torch.Tensor | None:
    """The weight of each answer with a target in the divergences, ``[P]``; None where all count equally."""
    advantage_P, samples_P = inputs.targets.advantage_A, inputs.batch.answer_samples_A
    if advantage_P is None:
        return None
    if inputs.targets.paired_P is not None:
        samples_P = samples_P[inputs.targets.paired_P]
    return recipe_token_weights(inputs.recipe, advantage_P, samples_P, inputs.batch.samples)


def _joined(parts: Sequence[AnswerTerms], positions: Sequence[torch.Tensor]) -> AnswerTerms:
    """The terms of all answers from those of several parts; ``positions`` of each part's answers among all."""
    found_A = torch.cat([part.finite_A for part in parts])
    finite_A = torch.empty_like(found_A).index_copy(0, torch.cat(list(positions)), found_A)
    sums = {name: torch.stack([part.sums[name] for part in parts if name in part.sums]).sum() for name in parts[0].sums}
    return AnswerTerms(torch.stack([part.loss for part in parts]).sum(), sums, finite_A)
