"""The student under a recipe: one forward pass, every term, weighted and unweighted.

Shapes: as in :mod:`alignkd.losses`; N images, P patches, C tower width.
"""

from dataclasses import dataclass
from typing import Protocol, TypedDict

import torch
from torch import nn

from alignkd.adapters import HeadMean, WidthAdapter, make_head_map
from alignkd.answer_loss import AnswerTerms, answer_terms
from alignkd.batch import Batch, Counts
from alignkd.capture import Captured, capture, enable_capture
from alignkd.logits import DIVERGENCES, LogitCodec
from alignkd.losses import attention_loss, focus_mask, vision_loss
from alignkd.models.vlm import Vlm
from alignkd.recipes import Recipe
from alignkd.targets import Targets

TERMS = ("supervised", *DIVERGENCES, "attention", "vision_all", "vision_focus")


class TargetSource(Protocol):
    """What computes targets for each batch, instead of a cache's rows: a teacher's slice, or the whole teacher."""

    def fill(self, student: Vlm, batch: Batch, targets: Targets, needs: frozenset[str]) -> tuple[Batch, Targets]:
        """Add the targets of ``needs`` that it gives; where both share a tower, the batch then carries its features."""


@dataclass(frozen=True)
class TeacherShape:
    """What the adapters must know of the teacher: its heads (1 for a head mean) and width."""

    heads: int
    width: int


class Outcome(TypedDict):
    """What one batch gave; a dictionary, as wrappers of modules look for tensors in those.

    ``loss``: the weighted sum of terms, times the processes whose gradients are averaged; differentiable.
    ``terms``: each unweighted term by its name in :data:`TERMS`, this batch's share of the step's mean; no gradient.
    ``bad_B``: samples of which a term is not finite. ``attention_BHTV``: the teacher's, where the recipe compares it.
    """

    loss: torch.Tensor
    terms: dict[str, torch.Tensor]
    bad_B: torch.Tensor
    attention_BHTV: torch.Tensor | None


class Objective(nn.Module):
    """The student and the adapters that align it to a teacher's targets; ``forward`` gives the loss and its terms.

    A ``source`` computes targets for each batch, instead of being given them. ``logit_codec`` knows what the answers' targets
    mean; recipes with a logit term need one. ``touches_all``: every trained parameter gets a gradient from every batch, if
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
        touches_all: bool = False,
    ) -> None:
        super().__init__()
        self.vlm = student
        self.student = student.model
        self.recipe = recipe
        self.source = source
        assert logit_codec is not None or not recipe.divergences
        self.logit_codec = logit_codec
        self.touches_all = touches_all
        self.head_map: nn.Module | None = None
        self.width_map: WidthAdapter | None = None
        if recipe.attention > 0:
            assert teacher is not None
            self.head_map = make_head_map(recipe.head_map, teacher.heads, student.heads)
        if recipe.vision > 0:
            assert teacher is not None
            self.width_map = WidthAdapter(teacher.width, student.hidden_size, recipe.width_map)
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
        recipe, targets = recipe or self.recipe, targets.dequantise()
        counts = counts or batch.counts()
        if self.source is not None:
            with torch.no_grad():
                batch, targets = self.source.fill(self.vlm, batch, targets, recipe.needs)
        # Where others see an image: parameters that are gathered from all processes are gathered in the same order by all.
        unseen = self.vlm.nothing_seen() if self.touches_all and not batch.images.numel() else None
        captured = capture(self.vlm, batch, attention=recipe.attention > 0)
        weights = term_weights(recipe)
        answers = self._answer_terms(recipe, captured, batch, targets, counts)
        sums = {name: total / max(counts.answers, 1) for name, total in answers.sums.items()}
        bad_B = _samples_of(~answers.finite_A, batch)
        loss = answers.loss
        for name, (value_B, samples) in self._alignment_terms(recipe, captured, batch, targets, counts).items():
            term = value_B.sum() / max(samples, 1)
            # A term of weight 0 stays out: 0 times an overflow would still poison the sum.
            loss = loss + weights[name] * term if weights[name] > 0 else loss
            sums[name], bad_B = term.detach(), bad_B | ~value_B.detach().isfinite()
        loss = loss if unseen is None else loss + unseen
        attention_BHTV = targets.attention_BHTV if self.head_map is not None and recipe.attention > 0 else None
        return Outcome(loss=loss * counts.processes, terms=sums, bad_B=bad_B, attention_BHTV=attention_BHTV)

    def _answer_terms(self, recipe: Recipe, captured: Captured, batch: Batch, targets: Targets, counts: Counts) -> AnswerTerms:
        assert bool(targets.answers) or not recipe.divergences, "a recipe with logit terms needs logit targets"
        weights = term_weights(recipe)
        return answer_terms(
            captured.hidden_AD,
            self.vlm.head.weight,
            batch.answer_ids_A,
            weights={name: weights[name] for name in ("supervised", *recipe.divergences)},
            codec=self.logit_codec,
            values=targets.answers if recipe.divergences else {},
            temperature=recipe.temperature,
            divisor=max(counts.answers, 1),
            bias_N=self.vlm.head.bias,
        )

    def _alignment_terms(
        self, recipe: Recipe, captured: Captured, batch: Batch, targets: Targets, counts: Counts
    ) -> dict[str, tuple[torch.Tensor, float]]:
        """Each term of each sample ``[B]``, and the number of samples it is averaged over."""
        terms = {}
        masks = (batch.text_mask_BT, batch.vision_mask_BV)
        if self.head_map is not None and recipe.attention > 0:
            assert captured.attention_BHTV is not None
            assert targets.attention_BHTV is not None
            student = captured.attention_BHTV
            if isinstance(self.head_map, HeadMean):
                student = self.head_map(student)
            teacher = self.head_map(targets.attention_BHTV)
            loss_B = attention_loss(student, teacher, *masks, relative_to_uniform=recipe.normalise)
            terms["attention"] = (loss_B, counts.attended)
        if self.width_map is not None and recipe.vision > 0:
            assert targets.vision_BVD is not None
            student, teacher = self.width_map(captured.vision_BVD, targets.vision_BVD)
            chosen = {"vision_all": batch.vision_mask_BV}
            if recipe.vision_focus > 0:
                assert targets.attention_BHTV is not None
                chosen["vision_focus"] = focus_mask(targets.attention_BHTV, batch.vision_mask_BV, recipe.focus_k)
            for name, mask in chosen.items():
                loss_B = vision_loss(student, teacher, mask, batch.vision_mask_BV, relative_to_variance=recipe.normalise)
                terms[name] = (loss_B, counts.seen)
        return terms


def _samples_of(chosen_A: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Samples that a chosen answer belongs to, ``[B]`` of bool."""
    found_B = torch.zeros(batch.samples, dtype=torch.int32, device=chosen_A.device)
    return found_B.index_add_(0, batch.answer_samples_A, chosen_A.to(torch.int32)) > 0


def term_weights(recipe: Recipe) -> dict[str, float]:
    """The factor of each unweighted term in the loss."""
    return {
        "supervised": recipe.supervised,
        **{name: getattr(recipe, name) for name in DIVERGENCES},
        "attention": recipe.attention,
        "vision_all": recipe.vision,
        "vision_focus": recipe.vision * recipe.vision_focus,
    }
