"""Terms of several teachers as one: each sample's mean over its teachers, and each answer's.

Shapes: B samples, A answers, X some of them; D width, N vocabulary, K teachers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from alignkd.losses.answer_loss.chunk import SUPERVISED
from alignkd.losses.answer_loss.fused import AnswerTerms, answer_terms
from alignkd.losses.contract import SampleTerm, TermInputs
from alignkd.losses.token_weights import recipe_token_weights
from alignkd.losses.uniformity import attention_contrast
from alignkd.targets.several import AnswerPart, teacher_name

Sums = dict[str, torch.Tensor]


def average_sample_terms(
    found: Sequence[Mapping[str, SampleTerm]], weights_KB: torch.Tensor
) -> tuple[dict[str, SampleTerm], Sums]:
    """The terms of each teacher, weighted and added; and each teacher's own sum over its samples, by ``TERM/TEACHER``.

    What a term gives for samples of other teachers is dropped.
    """
    together, sums = dict[str, SampleTerm](), Sums()
    for number, terms in enumerate(found):
        weight_B = weights_KB[number]
        is_its_B = weight_B > 0
        for name, term in terms.items():
            value_B = term.value_B.masked_fill(~is_its_B, 0.0)
            sums[f"{name}/{teacher_name(number)}"] = value_B.detach().sum()
            value_B, bad_B = value_B * weight_B.to(value_B.dtype), term.bad_B & is_its_B
            if (before := together.get(name)) is not None:
                value_B, bad_B = before.value_B + value_B, before.bad_B | bad_B
            together[name] = replace(term, value_B=value_B, bad_B=bad_B)
    return together, sums


def average_answer_terms(
    inputs: Sequence[TermInputs],
    parts: Sequence[AnswerPart],
    head_ND: torch.Tensor,
    bias_N: torch.Tensor | None,
    *,
    weights: Mapping[str, float],
    divisor: float,
) -> tuple[AnswerTerms, Sums]:
    """The supervised term once and each teacher's divergences by its weight; and each teacher's own sums, by ``TERM/TEACHER``.

    ``inputs`` of each teacher: they differ in their targets. ``weights`` in the loss, by term; each term is a sum over answers
    over ``divisor``.
    """
    recipe, batch, hidden_AD = inputs[0].recipe, inputs[0].batch, inputs[0].student_hidden_AD
    divergences = {name: weights[name] for name in recipe.divergences}
    total, by_token = dict[str, torch.Tensor](), [_token_weights(one, number, parts) for number, one in enumerate(inputs)]
    losses, own = list[torch.Tensor](), Sums()
    finite_A = torch.ones(len(batch.answer_ids_A), dtype=torch.bool, device=hidden_AD.device)
    for part in parts:
        wanted = {SUPERVISED: weights[SUPERVISED]} if part.supervised else {}
        if part.teacher is not None:
            wanted |= {name: weight * part.weight for name, weight in divergences.items()}
        if not wanted:
            continue
        found = answer_terms(
            _chosen(hidden_AD, part.places_X),
            head_ND,
            _chosen(batch.answer_ids_A, part.places_X),
            weights=wanted,
            codec=None if part.teacher is None else inputs[part.teacher].logit_codec,
            values=_values(inputs, part) if divergences else {},
            temperature=recipe.temperature,
            divisor=divisor,
            bias_N=bias_N,
            token_weights_A=None if part.teacher is None else _of_rows(by_token[part.teacher], part.rows_X),
        )
        losses.append(found.loss)
        _mark(finite_A, part.places_X, found.finite_A)
        for name, value in found.sums.items():
            counted = value if name == SUPERVISED else value * part.weight
            total[name] = total[name] + counted if name in total else counted
            if name != SUPERVISED and part.teacher is not None:
                key = f"{name}/{teacher_name(part.teacher)}"
                own[key] = own[key] + value if key in own else value
    nothing = hidden_AD.new_zeros((), dtype=losses[0].dtype)
    sums = {name: total.get(name, nothing) for name in (SUPERVISED, *divergences)}
    return AnswerTerms(torch.stack(losses).sum(), sums, finite_A), own


def _values(inputs: Sequence[TermInputs], part: AnswerPart) -> Mapping[str, torch.Tensor]:
    if part.teacher is None:
        return {}
    return {name: _chosen(values, part.rows_X) for name, values in inputs[part.teacher].targets.answers.items()}


def _token_weights(inputs: TermInputs, teacher: int, parts: Sequence[AnswerPart]) -> torch.Tensor | None:
    """The weight of each answer that a teacher has targets for in its divergences; None where all count equally."""
    advantage_P = inputs.targets.advantage_A
    if advantage_P is None:
        return None
    samples_P = torch.zeros(len(advantage_P), dtype=torch.long, device=advantage_P.device)
    for part in parts:
        if part.teacher == teacher:
            samples_X = _chosen(inputs.batch.answer_samples_A, part.places_X)
            samples_P = samples_X if part.rows_X is None else samples_P.index_copy(0, part.rows_X, samples_X)
    return recipe_token_weights(inputs.recipe, advantage_P, samples_P, inputs.batch.samples)


def _chosen(values: torch.Tensor, places_X: torch.Tensor | None) -> torch.Tensor:
    return values if places_X is None else values[places_X]


def _of_rows(weights_P: torch.Tensor | None, rows_X: torch.Tensor | None) -> torch.Tensor | None:
    return None if weights_P is None else _chosen(weights_P, rows_X)


def _mark(finite_A: torch.Tensor, places_X: torch.Tensor | None, finite_X: torch.Tensor) -> None:
    """Answers of two parts are finite if they are so in both."""
    if places_X is None:
        finite_A &= finite_X
    else:
        finite_A[places_X] = finite_A[places_X] & finite_X


def contrasts(inputs: Sequence[TermInputs]) -> Sums:
    """How much each teacher's attention differs over vision columns, in the first compared layer; NaN where it has none."""
    return {
        f"attention_contrast/{teacher_name(number)}": attention_contrast(
            one.targets.attention[one.layer_pairs[0][1]], one.batch.text_mask_BT, one.batch.vision_mask_BV
        )
        for number, one in enumerate(inputs)
    }
