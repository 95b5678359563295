"""The student under a recipe: one forward pass, then every loss term, weighted and unweighted.

Shapes: as in :mod:`alignkd.losses.contract`.
"""

from typing import Protocol, TypedDict

import torch
from torch import nn

from alignkd.capture.attention import capture, enable_capture
from alignkd.capture.layer_pairs import find_layer_pairs
from alignkd.inputs.batch import Batch, Counts
from alignkd.losses.adapters import WidthAdapter, make_head_map
from alignkd.losses.agreement import agreement
from alignkd.losses.answer_loss.paired import batch_answer_terms
from alignkd.losses.attention_and_vision import attention_term, vision_terms
from alignkd.losses.contract import SampleTerm, TeacherShape, TermInputs, TermShapes, check_targets_given, check_teacher_given
from alignkd.losses.extra_terms import ExtraTerms
from alignkd.losses.learned_weights import LearnedWeights, as_numbers, learned_part
from alignkd.losses.recipes import Recipe, term_weights
from alignkd.models.vlm import Vlm
from alignkd.targets.batch_targets import DecodedTargets, Targets
from alignkd.targets.logits import LogitCodec

__all__ = ["Objective", "Outcome", "TargetSource", "TeacherShape"]


class TargetSource(Protocol):
    """Computes targets for each batch, in place of a cache's rows: a slice of the teacher, or the whole teacher."""

    def fill(self, student: Vlm, batch: Batch, targets: DecodedTargets, needs: frozenset[str]) -> tuple[Batch, DecodedTargets]:
        """Add the targets of ``needs`` that it computes; where both share a tower, the batch then carries its features."""


class Outcome(TypedDict):
    """What one batch gave. A dictionary, since wrappers of modules look for tensors in dictionaries.

    ``loss``: the weighted sum of terms, times the processes whose gradients are averaged; differentiable.
    ``terms``: each unweighted term by its name, as this batch's share of the step's mean; no gradient.
    ``bad_B``: samples for which a term is not finite. ``attention_BHTV``: the teacher's, in the first compared layer, if any.
    ``precisions``: of each term, where the recipe learns them: factors of the recipe's weights; no gradient.
    ``agreement``: how many answers the student's likeliest token is the teacher's for, and how many were compared, ``[2]``;
    None where it was not asked for.
    """

    loss: torch.Tensor
    terms: dict[str, torch.Tensor]
    bad_B: torch.Tensor
    attention_BHTV: torch.Tensor | None
    precisions: dict[str, torch.Tensor]
    agreement: torch.Tensor | None


class Objective(nn.Module):
    """The student, and the adapters that map it to a teacher's targets; ``forward`` gives the loss and its terms.

    A ``source`` computes targets for each batch. ``logit_codec`` reads the targets of answers; recipes with a logit term need
    one. ``keep_all_parameters_in_graph``: every trained parameter gets a gradient from every batch, if only zeros, since
    processes that average gradients must agree on which there are.
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
        """Build the adapters and the terms that have parameters, on the student's device.

        Raises:
            ConfigError: the recipe needs a teacher's shape or a codec of logits that is not given, or a layer or head map that
                student and teacher do not have.
        """
        super().__init__()
        self.vlm = student
        self.student = student.model
        self.recipe = recipe
        self.source = source
        check_teacher_given(recipe, teacher, logit_codec)
        self.logit_codec = logit_codec
        self.keep_all_parameters_in_graph = keep_all_parameters_in_graph
        self.head_map: nn.Module | None = None
        self.other_head_maps = nn.ModuleList()
        self.width_map: WidthAdapter | None = None
        self.layer_pairs: tuple[tuple[int, int], ...] = ()
        if recipe.compares_attention and teacher is not None:
            self.layer_pairs = find_layer_pairs(recipe, student, teacher.layers)
        if recipe.attention > 0 and teacher is not None:
            self.head_map, *others = (make_head_map(recipe.head_map, teacher.heads, student.heads) for _ in self.layer_pairs)
            self.other_head_maps.extend(others)
        if recipe.vision > 0 and teacher is not None:
            self.width_map = WidthAdapter(teacher.width, student.hidden_size, recipe.width_map)
        self.learned_weights: LearnedWeights | None = None
        if recipe.weighting == "learned":
            self.learned_weights = LearnedWeights(name for name, weight in term_weights(recipe).items() if weight > 0)
        self.extra_terms = ExtraTerms(recipe, TermShapes(student.heads, student.hidden_size, student.layers, teacher))
        self.to(student.device)
        student.freeze_tower()
        enable_capture(student)

    def train(self, mode: bool = True) -> "Objective":
        """Set training mode everywhere except in the frozen tower."""
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

    def forward(
        self,
        batch: Batch,
        targets: Targets,
        counts: Counts | None = None,
        recipe: Recipe | None = None,
        *,
        with_agreement: bool = False,
    ) -> Outcome:
        """The loss and every term.

        ``counts`` of the whole step, if it has other batches; otherwise this batch's are used, for which a GPU is waited for.
        ``recipe``: one with some of the terms of the objective's own, in place of that. ``with_agreement``: compare the
        likeliest tokens as well, which needs logit targets.
        """
        recipe, decoded = recipe or self.recipe, targets.dequantise()
        counts = counts or decoded.mask_to_targets(batch).counts()
        if self.source is not None:
            with torch.no_grad():
                batch, decoded = self.source.fill(self.vlm, batch, decoded, recipe.needs)
        check_targets_given(recipe, decoded)
        # Other processes may have an image: where parameters are gathered, all processes must gather them in the same order.
        keep_all = self.keep_all_parameters_in_graph
        no_image = self.vlm.zero_projector_loss() if keep_all and not batch.images.numel() else None
        inputs = self._inputs(batch, decoded, recipe)
        weights = term_weights(recipe)
        precisions, penalty = ({}, None) if self.learned_weights is None else self.learned_weights.of_weights(weights)
        # As numbers: the gradient of the answer terms is computed with their weights, in the forward pass.
        factors = as_numbers(precisions)
        in_loss = {name: weight * factors.get(name, 1.0) for name, weight in weights.items()}
        head, answers = self.vlm.head, max(counts.answers, 1)
        answer_terms = batch_answer_terms(inputs, head.weight, head.bias, weights=in_loss, divisor=answers)
        loss, bad_B = answer_terms.loss, batch.samples_of_answers(~answer_terms.finite_A)
        terms = {name: total / answers for name, total in answer_terms.sums.items()}
        for name, found in self._sample_terms(inputs, counts).items():
            term = found.value_B.sum() / max(found.samples, 1)
            # A term of weight 0 is not added: 0 times an overflow would still make the sum NaN.
            loss = loss + in_loss[name] * term if weights[name] > 0 else loss
            terms[name], bad_B = term.detach(), bad_B | found.bad_B
        loss = loss if no_image is None else loss + no_image
        if penalty is not None and recipe is self.recipe:
            # Each batch of a step adds as much of the penalty as it has of the step's answers.
            share = len(batch.answer_ids_A) / answers
            loss = loss + learned_part(precisions, {name: weights[name] * terms[name] for name in precisions}, penalty * share)
        return Outcome(
            loss=loss * counts.processes,
            terms=terms,
            bad_B=bad_B,
            attention_BHTV=decoded.attention[self.layer_pairs[0][1]] if recipe.compares_attention else None,
            precisions={name: precision.detach() for name, precision in precisions.items()},
            agreement=agreement(inputs, head.weight, head.bias) if with_agreement else None,
        )

    def _inputs(self, batch: Batch, targets: DecodedTargets, recipe: Recipe) -> TermInputs:
        """The student's forward pass."""
        layers = [student for student, _ in self.layer_pairs]
        captured = capture(self.vlm, batch, attention=recipe.compares_attention, layers=layers)
        return TermInputs(
            targets.mask_to_targets(batch),
            targets,
            captured.attention,
            captured.vision_BVD,
            captured.hidden_AD,
            recipe,
            self.layer_pairs,
            self.logit_codec,
        )

    def _sample_terms(self, inputs: TermInputs, counts: Counts) -> dict[str, SampleTerm]:
        """The terms that are averaged within a sample: attention, vision, then those from outside the package."""
        recipe, found = inputs.recipe, {}
        if self.head_map is not None and recipe.attention > 0:
            value_B = attention_term(inputs, [self.head_map, *self.other_head_maps])
            found["attention"] = SampleTerm.of(value_B, counts.with_text_after_image)
        if self.width_map is not None and recipe.vision > 0:
            for name, value_B in vision_terms(inputs, self.width_map).items():
                found[name] = SampleTerm.of(value_B, counts.with_image)
        if recipe.extra_terms:
            found |= self.extra_terms(inputs, counts, keep_parameters_in_graph=self.keep_all_parameters_in_graph)
        return found
