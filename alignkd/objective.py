"""The student under a recipe: one forward pass, every term, weighted and unweighted.

Shapes: as in :mod:`alignkd.losses`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from alignkd.adapters import HeadMean, WidthAdapter, make_head_map
from alignkd.batch import Batch
from alignkd.capture import Captured, capture, enable_capture
from alignkd.logits import DIVERGENCES, LogitCodec
from alignkd.losses import attention_loss, focus_mask, supervised_loss, vision_loss
from alignkd.models.vlm import Vlm
from alignkd.recipes import Recipe
from alignkd.targets import Targets
from alignkd.teacher_slice import TeacherSlice

TERMS = ("supervised", *DIVERGENCES, "attention", "vision_all", "vision_focus")

_LOGITS_AT_ONCE = 2**25
"""Logits held at a time (128 MB in float32); the rest is recomputed in backward, chunk by chunk."""


@dataclass(frozen=True)
class TeacherShape:
    """What the adapters must know of the teacher: its heads (1 for a head mean) and width."""

    heads: int
    width: int


class Objective(nn.Module):
    """The student and the adapters that align it to a teacher's targets; ``forward`` gives the loss and its terms.

    With a ``teacher_slice`` attention and vision targets are computed for each batch, instead of being given.
    ``logit_codec`` knows what the answers' targets mean; recipes with a logit term need one.
    """

    def __init__(
        self,
        student: Vlm,
        recipe: Recipe,
        teacher: TeacherShape | None,
        teacher_slice: TeacherSlice | None = None,
        logit_codec: LogitCodec | None = None,
    ) -> None:
        super().__init__()
        self.student = student.model
        self.recipe = recipe
        self.teacher_slice = teacher_slice
        assert logit_codec is not None or not recipe.divergences
        self.logit_codec = logit_codec
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
        enable_capture(self.student)

    def train(self, mode: bool = True) -> "Objective":
        """Set training mode everywhere but in the frozen tower."""
        super().train(mode)
        self.student.model.vision_tower.eval()
        return self

    def recompute_activations(self) -> None:
        """Recompute decoder layers in backward, always non-reentrant: the reentrant kind silently zeroes gradients."""
        decoder, kwargs = self.student.model.language_model, {"use_reentrant": False}
        if hasattr(decoder, "activation_checkpointing_enable"):
            decoder.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
        else:
            decoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)

    def forward(self, batch: Batch, targets: Targets) -> dict[str, torch.Tensor]:
        """``loss`` (weighted sum) and each unweighted term by its name in :data:`TERMS`, all scalars."""
        recipe, targets = self.recipe, targets.dequantise()
        if self.teacher_slice is not None:
            batch, targets = self._recomputed(self.teacher_slice, batch, targets)
        captured = capture(self.student, batch, attention=recipe.attention > 0)
        terms = self._answer_terms(captured, batch, targets)
        terms.update(self._alignment_terms(captured, batch, targets))
        weights = term_weights(recipe)
        # A term of weight 0 stays out: 0 times an overflow would still poison the sum.
        weighted = [weights[name] * value for name, value in terms.items() if weights[name] > 0]
        loss = sum(weighted, start=terms["supervised"].new_zeros(()))
        return {"loss": loss, **{name: value.detach() for name, value in terms.items()}}

    @torch.no_grad()
    def _recomputed(self, teacher_slice: TeacherSlice, batch: Batch, targets: Targets) -> tuple[Batch, Targets]:
        """Fill in what the slice gives; where the tower is one, it runs once for both and the batch then carries features."""
        if teacher_slice.shares_tower and batch.images.dim() == 4:
            batch = replace(batch, images=self.student.model.encode_images(batch.images))
        attention_BHTV, vision_BVD = teacher_slice.targets(batch, attention="attention" in self.recipe.needs)
        return batch, replace(targets, attention_BHTV=attention_BHTV, vision_BVD=vision_BVD)

    def _answer_terms(self, captured: Captured, batch: Batch, targets: Targets) -> dict[str, torch.Tensor]:
        hidden_AD, answers = captured.hidden_AD, batch.answer_ids_A.shape[0]
        names = tuple(targets.answers) if self.recipe.divergences else ()
        assert bool(names) == bool(self.recipe.divergences), "a recipe with logit terms needs logit targets"

        def sums(hidden_AD: torch.Tensor, answer_ids_A: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
            return self._answer_sums(hidden_AD, answer_ids_A, dict(zip(names, values, strict=True)))

        chunk = max(1, _LOGITS_AT_ONCE // self.student.lm_head.weight.shape[0])
        totals = []
        for start in range(0, max(answers, 1), chunk):
            part = slice(start, start + chunk)
            arguments = (hidden_AD[part], batch.answer_ids_A[part], *(targets.answers[name][part] for name in names))
            if answers > chunk and torch.is_grad_enabled():
                totals.append(checkpoint(sums, *arguments, use_reentrant=False))
            else:
                totals.append(sums(*arguments))
        means = torch.stack(totals).sum(dim=0) / max(answers, 1)
        return dict(zip(("supervised", *self.recipe.divergences), means.unbind(), strict=True))

    def _answer_sums(
        self, hidden_AD: torch.Tensor, answer_ids_A: torch.Tensor, values: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Cross-entropy, then each divergence of the recipe, summed over answers."""
        logits_AN = self.student.lm_head(hidden_AD)
        found = [supervised_loss(logits_AN, answer_ids_A)]
        for name in self.recipe.divergences:
            assert self.logit_codec is not None
            found.append(self.logit_codec.divergence(name, logits_AN, values, self.recipe.temperature).sum())
        return torch.stack(found)

    def _alignment_terms(self, captured: Captured, batch: Batch, targets: Targets) -> dict[str, torch.Tensor]:
        recipe, terms = self.recipe, {}
        masks = (batch.text_mask_BT, batch.vision_mask_BV)
        if self.head_map is not None:
            assert captured.attention_BHTV is not None
            assert targets.attention_BHTV is not None
            student = captured.attention_BHTV
            if isinstance(self.head_map, HeadMean):
                student = self.head_map(student)
            teacher = self.head_map(targets.attention_BHTV)
            terms["attention"] = attention_loss(student, teacher, *masks, relative_to_uniform=recipe.normalise)
        if self.width_map is not None:
            assert targets.vision_BVD is not None
            student, teacher = self.width_map(captured.vision_BVD, targets.vision_BVD)
            chosen = {"vision_all": batch.vision_mask_BV}
            if recipe.vision_focus > 0:
                assert targets.attention_BHTV is not None
                chosen["vision_focus"] = focus_mask(targets.attention_BHTV, batch.vision_mask_BV, recipe.focus_k)
            for name, mask in chosen.items():
                terms[name] = vision_loss(student, teacher, mask, batch.vision_mask_BV, relative_to_variance=recipe.normalise)
        return terms


def term_weights(recipe: Recipe) -> dict[str, float]:
    """The factor of each unweighted term in the loss."""
    return {
        "supervised": recipe.supervised,
        **{name: getattr(recipe, name) for name in DIVERGENCES},
        "attention": recipe.attention,
        "vision_all": recipe.vision,
        "vision_focus": recipe.vision * recipe.vision_focus,
    }
