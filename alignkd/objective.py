"""The student under a recipe: one forward pass, every term, weighted and unweighted.

Shapes: as in :mod:`alignkd.losses.terms`; N images, P patches, C tower width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypedDict

import torch
from torch import nn

from alignkd.capture.attention import Captured, capture, enable_capture
from alignkd.capture.layer_pairs import find_layer_pairs
from alignkd.inputs.batch import Batch, Counts
from alignkd.losses.adapters import HeadMean, WidthAdapter, make_head_map
from alignkd.losses.answer_loss import AnswerTerms, answer_terms
from alignkd.losses.attention_distance import attention_distance, chosen_rows
from alignkd.losses.learned_weights import LearnedWeights, learned_part
from alignkd.losses.recipes import Recipe, term_weights
from alignkd.losses.terms import focus_mask, vision_loss
from alignkd.models.vlm import Vlm
from alignkd.targets.batch_targets import DecodedTargets, Targets
from alignkd.targets.logits import LogitCodec


class TargetSource(Protocol):
    """What computes targets for each batch, instead of a cache's rows: a teacher's slice, or the whole teacher."""

    def fill(self, student: Vlm, batch: Batch, targets: DecodedTargets, needs: frozenset[str]) -> tuple[Batch, DecodedTargets]:
        """Add the targets of ``needs`` that it gives; where both share a tower, the batch then carries its features."""


@dataclass(frozen=True)
class TeacherShape:
    """What must be known of the teacher: its heads (1 for a head mean), its width, and how many layers it has.

    ``layers`` may be None where the first is the only one that is compared.
    """

    heads: int
    width: int
    layers: int | None = None


class Outcome(TypedDict):
    """What one batch gave; a dictionary, as wrappers of modules look for tensors in those.

    ``loss``: the weighted sum of terms, times the processes whose gradients are averaged; differentiable.
    ``terms``: each unweighted term by its name in :data:`TERMS`, this batch's share of the step's mean; no gradient.
    ``bad_B``: samples of which a term is not finite. ``attention_BHTV``: the teacher's in the first layer compared, if any.
    ``precisions``: of each term, where the recipe learns them: factors of the recipe's weights; no gradient.
    """

    loss: torch.Tensor
    terms: dict[str, torch.Tensor]
    bad_B: torch.Tensor
    attention_BHTV: torch.Tensor | None
    precisions: dict[str, torch.Tensor]


class Objective(nn.Module):
    """The student and the adapters that align it to a teacher's targets; ``forward`` gives the loss and its terms.

    A ``source`` computes targets for each batch, instead of being given them. ``logit_codec`` knows what the answers' targets
    mean; recipes with a logit term need one. ``keep_all_parameters_in_graph``: every trained parameter gets a gradient from
    every batch, if
    only zeros, as processes that average gradients must agree on which there are.
    """

    def __init__(
        self,
        student: Vlm,
        recipe: Recipe,
        teacher: TeacherShape | None,
        source: TargetSource | None = None,
        logit_codec: LogitCodec | None = None,
        *,
        keep_all_parameters_in_graph: bool = False,
    ) -> None:
        super().__init__()
        self.vlm = student
        self.student = student.model
        self.recipe = recipe
        self.source = source
        assert logit_codec is not None or not recipe.divergences
        self.logit_codec = logit_codec
        self.keep_all_parameters_in_graph = keep_all_parameters_in_graph
        self.head_map: nn.Module | None = None
        self.other_head_maps = nn.ModuleList()
        self.width_map: WidthAdapter | None = None
        self.layer_pairs: tuple[tuple[int, int], ...] = ()
        if recipe.attention > 0:
            assert teacher is not None
            self.layer_pairs = find_layer_pairs(recipe, student, teacher.layers)
            self.head_map, *others = (make_head_map(recipe.head_map, teacher.heads, student.heads) for _ in self.layer_pairs)
            self.other_head_maps.extend(others)
        if recipe.vision > 0:
            assert teacher is not None
            self.width_map = WidthAdapter(teacher.width, student.hidden_size, recipe.width_map)
        self.learned_weights: LearnedWeights | None = None
        if recipe.weighting == "learned":
            self.learned_weights = LearnedWeights(name for name, weight in term_weights(recipe).items() if weight > 0)
        self.to(student.device)
        student.freeze_tower()
        enable_capture(student)

    def train(self, mode: bool = True) -> "Objective":
        """Set training mode everywhere but in the frozen tower."""
        super().train(mode)
        self.vlm.tower.eval()
        return self

    def recompute_activations(self) -> None:
        """Recompute decoder layers in backward, always non-reentrant: the reentrant kind silently zeroes gradients."""
        decoder, kwargs = self.vlm.decoder, {"use_reentrant": False}
        if hasattr(decoder, "activation_checkpointing_enable"):
            decoder.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
        else:
            decoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)

    def forward(self, batch: Batch, targets: Targets, counts: Counts | None = None, recipe: Recipe | None = None) -> Outcome:
        """The loss and every term.

        ``counts`` are those of the whole step, where it has other batches; else this batch's, for which a GPU is waited for.
        ``recipe``: another than its own, of terms that its own has, too.
        """
        recipe, decoded = recipe or self.recipe, targets.dequantise()
        counts = counts or decoded.mask_to_targets(batch).counts()
        if self.source is not None:
            with torch.no_grad():
                batch, decoded = self.source.fill(self.vlm, batch, decoded, recipe.needs)
        # Where others see an image: parameters that are gathered from all processes are gathered in the same order by all.
        unseen = self.vlm.zero_projector_loss() if self.keep_all_parameters_in_graph and not batch.images.numel() else None
        captured = capture(self.vlm, batch, attention=recipe.attention > 0, layers=[student for student, _ in self.layer_pairs])
        weights = term_weights(recipe)
        precisions, penalty = self._precisions(weights)
        # As numbers: the gradient of the answers' terms is found with their weights, in the forward pass.
        factors = _as_numbers(precisions)
        in_loss = {name: weight * factors.get(name, 1.0) for name, weight in weights.items()}
        answers = self._answer_terms(recipe, in_loss, captured, batch, decoded, counts)
        sums = {name: total / max(counts.answers, 1) for name, total in answers.sums.items()}
        bad_B = _samples_of(~answers.finite_A, batch)
        loss = answers.loss
        alignment = self._alignment_terms(recipe, captured, decoded.mask_to_targets(batch), decoded, counts)
        for name, (value_B, samples) in alignment.items():
            term = value_B.sum() / max(samples, 1)
            # A term of weight 0 stays out: 0 times an overflow would still poison the sum.
            loss = loss + in_loss[name] * term if weights[name] > 0 else loss
            sums[name], bad_B = term.detach(), bad_B | ~value_B.detach().isfinite()
        loss = loss if unseen is None else loss + unseen
        if precisions and recipe is self.recipe:
            # Of a step's batches each adds as much of the penalty as it has of the step's answers.
            share = len(batch.answer_ids_A) / max(counts.answers, 1)
            loss = loss + learned_part(precisions, {name: weights[name] * sums[name] for name in precisions}, penalty * share)
        return Outcome(
            loss=loss * counts.processes,
            terms=sums,
            bad_B=bad_B,
            attention_BHTV=decoded.attention[self.layer_pairs[0][1]] if recipe.attention > 0 else None,
            precisions={name: precision.detach() for name, precision in precisions.items()},
        )

    def _precisions(self, weights: Mapping[str, float]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The learned precision of each term that counts, none where none is learned; and the penalty."""
        if self.learned_weights is None:
            return {}, torch.zeros(())
        precisions_K, log_variances_K = self.learned_weights()
        counting = [name for name, weight in weights.items() if weight > 0]
        return self.learned_weights.of_terms(precisions_K, counting), log_variances_K.sum()

    def _answer_terms(
        self,
        recipe: Recipe,
        weights: Mapping[str, float],
        captured: Captured,
        batch: Batch,
        targets: DecodedTargets,
        counts: Counts,
    ) -> AnswerTerms:
        assert bool(targets.answers) or not recipe.divergences, "a recipe with logit terms needs logit targets"
        supervised = {"supervised": weights["supervised"]}
        divergences = {name: weights[name] for name in recipe.divergences}
        if targets.paired_P is None or not divergences:
            return self._terms_of(captured.hidden_AD, batch.answer_ids_A, supervised | divergences, targets, recipe, counts)
        assert targets.unpaired_U is not None
        parts = []
        for places, wanted in ((targets.paired_P, supervised | divergences), (targets.unpaired_U, supervised)):
            hidden_XD, ids_X = captured.hidden_AD[places], batch.answer_ids_A[places]
            parts.append(self._terms_of(hidden_XD, ids_X, wanted, targets, recipe, counts))
        return joined(parts, [targets.paired_P, targets.unpaired_U])

    def _terms_of(
        self,
        hidden_AD: torch.Tensor,
        answer_ids_A: torch.Tensor,
        weights: Mapping[str, float],
        targets: DecodedTargets,
        recipe: Recipe,
        counts: Counts,
    ) -> AnswerTerms:
        return answer_terms(
            hidden_AD,
            self.vlm.head.weight,
            answer_ids_A,
            weights=weights,
            codec=self.logit_codec,
            values=targets.answers if len(weights) > 1 else {},
            temperature=recipe.temperature,
            divisor=max(counts.answers, 1),
            bias_N=self.vlm.head.bias,
        )

    def _alignment_terms(
        self, recipe: Recipe, captured: Captured, batch: Batch, targets: DecodedTargets, counts: Counts
    ) -> dict[str, tuple[torch.Tensor, float]]:
        """Each term of each sample ``[B]``, and the number of samples it is averaged over."""
        terms = {}
        if recipe.attention > 0:
            terms["attention"] = (self._attention_term(recipe, captured, batch, targets), counts.with_text_after_image)
        if self.width_map is not None and recipe.vision > 0:
            assert targets.vision_BVD is not None
            student, teacher = self.width_map(captured.vision_BVD, targets.vision_BVD)
            chosen = {"vision_all": batch.vision_mask_BV}
            if recipe.vision_focus > 0:
                chosen["vision_focus"] = focus_mask(targets.attention[0], batch.vision_mask_BV, recipe.focus_k)
            for name, mask in chosen.items():
                loss_B = vision_loss(student, teacher, mask, batch.vision_mask_BV, relative_to_variance=recipe.normalise)
                terms[name] = (loss_B, counts.with_image)
        return terms

    def _attention_term(self, recipe: Recipe, captured: Captured, batch: Batch, targets: DecodedTargets) -> torch.Tensor:
        """The attention term of each sample ``[B]``: the mean over the layers compared."""
        masks = (chosen_rows(batch, recipe.attention_rows), batch.vision_mask_BV)
        losses = []
        for (layer, teacher_layer), head_map in zip(self.layer_pairs, (self.head_map, *self.other_head_maps), strict=True):
            student, teacher = captured.attention[layer], targets.attention[teacher_layer]
            assert head_map is not None
            if isinstance(head_map, HeadMean):
                student = head_map(student)
            losses.append(
                attention_distance(
                    student, head_map(teacher), *masks, recipe.attention_distance, relative_to_uniform=recipe.normalise
                )
            )
        return torch.stack(losses).mean(dim=0)


def _as_numbers(scalars: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """On the host; one wait for the device, if there are any."""
    if not scalars:
        return {}
    return dict(zip(scalars, torch.stack(list(scalars.values())).tolist(), strict=True))


def joined(parts: Sequence[AnswerTerms], places: Sequence[torch.Tensor]) -> AnswerTerms:
    """The terms of answers in several parts; ``places`` of each part's answers among all."""
    found_A = torch.cat([part.finite_A for part in parts])
    finite_A = torch.empty_like(found_A).index_copy(0, torch.cat(list(places)), found_A)
    sums = {name: torch.stack([part.sums[name] for part in parts if name in part.sums]).sum() for name in parts[0].sums}
    return AnswerTerms(torch.stack([part.loss for part in parts]).sum(), sums, finite_A)


def _samples_of(chosen_A: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Samples that a chosen answer belongs to, ``[B]`` of bool."""
    found_B = torch.zeros(batch.samples, dtype=torch.int32, device=chosen_A.device)
    return found_B.index_add_(0, batch.answer_samples_A, chosen_A.to(torch.int32)) > 0
