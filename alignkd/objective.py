"""The student under a recipe: one forward pass, then every loss term, weighted and unweighted.

Shapes: as in :mod:`alignkd.losses.contract`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypedDict

import torch
from torch import nn

from alignkd.capture.attention import capture, enable_capture
from alignkd.capture.layer_pairs import find_layer_pairs
from alignkd.capture.teacher import TargetSource, Teacher
from alignkd.inputs.batch import Batch, Counts
from alignkd.losses.agreement import agreement
from alignkd.losses.answer_loss.chunk import SUPERVISED
from alignkd.losses.answer_loss.fused import AnswerTerms
from alignkd.losses.answer_loss.paired import batch_answer_terms
from alignkd.losses.contract import SampleTerm, TeacherShape, TermInputs, TermShapes, check_targets_given, check_teacher_given
from alignkd.losses.extra_terms import ExtraTerms
from alignkd.losses.learned_weights import LearnedWeights, as_numbers, learned_part
from alignkd.losses.recipes import Recipe, term_weights
from alignkd.losses.teachers.average import average_answer_terms, average_sample_terms, contrasts
from alignkd.losses.teachers.terms import OtherTeacher, TeacherTerms, no_targets
from alignkd.models.vlm import Vision, Vlm
from alignkd.targets.batch_targets import DecodedTargets, Targets
from alignkd.targets.logits import LogitCodec
from alignkd.targets.several import SeveralTargets

__all__ = ["Objective", "Outcome", "TargetSource", "Teacher", "TeacherShape"]


class Outcome(TypedDict):
    """What one batch gave. A dictionary, since wrappers of modules look for tensors in dictionaries.

    ``loss``: the weighted sum of terms, times the processes whose gradients are averaged; differentiable.
    ``terms``: each unweighted term by its name, as this batch's share of the step's mean; no gradient.
    ``bad_B``: samples for which a term is not finite. ``attention_BHTV``: the teacher's, in the first compared layer, if any.
    ``precisions``: of each term, where the recipe learns them: factors of the recipe's weights; no gradient.
    ``agreement``: how many answers the student's likeliest token is the teacher's for, and how many were compared, ``[2]``;
    None where it was not asked for. ``of_teachers``: where there are several, each teacher's own sum of a term over what it has
    targets for, by ``TERM/TEACHER``; and ``attention_contrast/TEACHER``, in place
    of ``attention_BHTV``. Empty where there is one teacher. ``answer_losses``: each answer term of each answer, ``[A]``,
    without any weight and without gradient; empty where terms were put together from several teachers or parts.
    """

    loss: torch.Tensor
    terms: dict[str, torch.Tensor]
    bad_B: torch.Tensor
    attention_BHTV: torch.Tensor | None
    precisions: dict[str, torch.Tensor]
    agreement: torch.Tensor | None
    of_teachers: dict[str, torch.Tensor]
    answer_losses: dict[str, torch.Tensor]


class Objective(TeacherTerms):
    """The student, and the adapters that map it to a teacher's targets; ``forward`` gives the loss and its terms.

    A ``source`` computes targets for each batch. ``logit_codec`` reads the targets of answers; recipes with a logit term need
    one. ``others``: teachers beside the one that these describe; batches then have :class:`SeveralTargets`, in the same order.
    ``keep_all_parameters_in_graph``: every trained parameter gets a gradient from every batch, if only zeros, since
    processes that average gradients must agree on which there are.
    """

    def __init__(
        self,
        student: Vlm,
        recipe: Recipe,
        teacher: TeacherShape | None,
        source: TargetSource | None = None,
        logit_codec: LogitCodec | None = None,
        others: Sequence[Teacher] = (),
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
        for given in (Teacher(source, logit_codec, teacher), *others):
            check_teacher_given(recipe, given.shape, given.logit_codec)
        self.logit_codec, self.shape = logit_codec, teacher
        self.keep_all_parameters_in_graph = keep_all_parameters_in_graph
        shapes = TermShapes(student.heads, student.hidden_size, student.layers, teacher)
        self.add_adapters(recipe, shapes, self._pairs(teacher))
        self.learned_weights: LearnedWeights | None = None
        if recipe.weighting == "learned":
            self.learned_weights = LearnedWeights(name for name, weight in term_weights(recipe).items() if weight > 0)
        self.extra_terms = ExtraTerms(recipe, shapes)
        self.others = nn.ModuleList(
            OtherTeacher(recipe, replace(shapes, teacher=one.shape), self._pairs(one.shape), one.logit_codec, one.source)
            for one in others
        )
        self.to(student.device)
        student.freeze_tower()
        enable_capture(student)

    def _pairs(self, teacher: TeacherShape | None) -> tuple[tuple[int, int], ...]:
        if not self.recipe.compares_attention or teacher is None:
            return ()
        return find_layer_pairs(self.recipe, self.vlm, teacher.layers)

    @property
    def teachers(self) -> "tuple[Objective | OtherTeacher, ...]":
        """What knows of each teacher: the objective itself of the first."""
        others: tuple[OtherTeacher, ...] = tuple(self.others)  # type: ignore[arg-type]
        return self, *others

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
        targets: Targets | SeveralTargets,
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
        recipe, counts = recipe or self.recipe, counts or targets.counts(batch)
        batch, decoded = self._decoded(batch, targets, recipe)
        # Other processes may have an image: where parameters are gathered, all processes must gather them in the same order.
        keep_all = self.keep_all_parameters_in_graph
        no_image = self.vlm.zero_projector_loss() if keep_all and not batch.images.numel() else None
        inputs = self._inputs(batch, decoded, recipe)
        weights = term_weights(recipe)
        precisions, penalty = ({}, None) if self.learned_weights is None else self.learned_weights.of_weights(weights)
        # As numbers: the gradient of the answer terms is computed with their weights, in the forward pass.
        factors = as_numbers(precisions)
        in_loss = {name: weight * factors.get(name, 1.0) for name, weight in weights.items()}
        answers = max(counts.answers, 1)
        answer_terms, of_teachers = self._answer_terms(inputs, targets, in_loss, answers)
        loss, bad_B = answer_terms.loss, batch.samples_of_answers(~answer_terms.finite_A)
        terms = {name: total / answers for name, total in answer_terms.sums.items()}
        sample_terms, sums = self._sample_terms(inputs, targets, counts)
        for name, found in sample_terms.items():
            term = found.value_B.sum() / max(found.samples, 1)
            # A term of weight 0 is not added: 0 times an overflow would still make the sum NaN.
            loss = loss + in_loss[name] * term if weights[name] > 0 else loss
            terms[name], bad_B = term.detach(), bad_B | found.bad_B
        loss = loss if no_image is None else loss + no_image
        if penalty is not None and recipe is self.recipe:
            # Each batch of a step adds as much of the penalty as it has of the step's answers.
            share = len(batch.answer_ids_A) / answers
            loss = loss + learned_part(precisions, {name: weights[name] * terms[name] for name in precisions}, penalty * share)
        several = len(inputs) > 1
        return Outcome(
            loss=loss * counts.processes,
            terms=terms,
            bad_B=bad_B,
            attention_BHTV=None if several or not recipe.compares_attention else decoded[0].attention[self.layer_pairs[0][1]],
            precisions={name: precision.detach() for name, precision in precisions.items()},
            agreement=self._agreement(inputs) if with_agreement else None,
            answer_losses=self._by_answer(answer_terms, recipe),
            of_teachers=of_teachers | sums | (contrasts(inputs) if several and recipe.compares_attention else {}),
        )

    def _decoded(self, batch: Batch, targets: Targets | SeveralTargets, recipe: Recipe) -> tuple[Batch, list[DecodedTargets]]:
        """The targets of each teacher, those that are made in the loop included; the batch, with features if they were needed.

        Raises:
            ConfigError: a teacher has no target that the recipe needs.
        """
        given = targets.teachers if isinstance(targets, SeveralTargets) else (targets,)
        found, with_features = list[DecodedTargets](), batch
        for teacher, stored in zip(self.teachers, given, strict=False):
            if stored is None:
                found.append(no_targets(batch, teacher.shape, teacher.layer_pairs))
                continue
            decoded = stored.dequantise()
            if teacher.source is not None:
                shares = with_features is not batch and teacher.source.shares_tower
                with torch.no_grad():
                    filled = teacher.source.fill(self.vlm, with_features if shares else batch, decoded, recipe.needs)
                decoded, with_features = filled[1], filled[0] if filled[0] is not batch else with_features
            check_targets_given(recipe, decoded)
            found.append(decoded)
        return with_features, found

    def _inputs(self, batch: Batch, targets: Sequence[DecodedTargets], recipe: Recipe) -> list[TermInputs]:
        """One forward pass of the student, beside the targets of each teacher."""
        layers = [student for student, _ in self.layer_pairs]
        vision = self._ready_vision(batch, targets)
        captured = capture(self.vlm, batch, attention=recipe.compares_attention, layers=layers, vision=vision)
        return [
            TermInputs(
                given.mask_to_targets(batch),
                given,
                captured.attention,
                captured.vision_BVD,
                captured.hidden_AD,
                recipe,
                teacher.layer_pairs,
                teacher.logit_codec,
            )
            for teacher, given in zip(self.teachers, targets, strict=False)
        ]

    def _ready_vision(self, batch: Batch, targets: Sequence[DecodedTargets]) -> Vision | None:
        """What the student makes of the teacher's own vision tokens, where a batch has these in place of images."""
        tokens_BVD = next((one.vision_BVD for one in targets if one.vision_BVD is not None), None)
        if self.vlm.teacher_projector is None or tokens_BVD is None or batch.images.numel() or not len(batch.vision_slots):
            return None
        tokens_MD = tokens_BVD.flatten(0, 1).index_select(0, batch.vision_slots)
        return Vision(self.vlm.teacher_projector.map(tokens_MD.to(self.vlm.dtype)))

    def _answer_terms(
        self, inputs: Sequence[TermInputs], targets: Targets | SeveralTargets, weights: Mapping[str, float], answers: float
    ) -> tuple[AnswerTerms, dict[str, torch.Tensor]]:
        head = self.vlm.head
        if isinstance(targets, SeveralTargets):
            return average_answer_terms(inputs, targets.parts, head.weight, head.bias, weights=weights, divisor=answers)
        return batch_answer_terms(inputs[0], head.weight, head.bias, weights=weights, divisor=answers), {}

    @staticmethod
    def _by_answer(terms: AnswerTerms, recipe: Recipe) -> dict[str, torch.Tensor]:
        """Each answer term of each answer, ``[A]``; none where they were averaged over teachers or parts."""
        names = (SUPERVISED, *recipe.divergences)
        return {} if terms.losses_TA is None else dict(zip(names, terms.losses_TA, strict=False))

    def _sample_terms(
        self, inputs: Sequence[TermInputs], targets: Targets | SeveralTargets, counts: Counts
    ) -> tuple[dict[str, SampleTerm], dict[str, torch.Tensor]]:
        """The terms that are averaged within a sample, of all teachers together; and each teacher's own sums, if several."""
        keep = self.keep_all_parameters_in_graph
        found = [
            teacher.sample_terms(one, counts, keep_parameters_in_graph=keep)
            for teacher, one in zip(self.teachers, inputs, strict=False)
        ]
        return average_sample_terms(found, targets.weights_KB) if isinstance(targets, SeveralTargets) else (found[0], {})

    def _agreement(self, inputs: Sequence[TermInputs]) -> torch.Tensor:
        """Of all teachers that have logits of the batch."""
        head = self.vlm.head
        found = [agreement(one, head.weight, head.bias) for one in inputs if one.targets.answers]
        return torch.stack(found).sum(dim=0) if found else torch.zeros(2, device=head.weight.device)
