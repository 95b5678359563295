"""The attention term and the vision terms of a batch, each averaged within a sample.

Shapes: as in :mod:`alignkd.losses.terms`.
"""

from collections.abc import Sequence

import torch
from torch import nn

from alignkd.losses.adapters import HeadMean, WidthAdapter
from alignkd.losses.attention_distance import attention_distance, chosen_rows
from alignkd.losses.contract import TermInputs
from alignkd.losses.terms import focus_mask, vision_loss


def attention_term(inputs: TermInputs, head_maps: Sequence[nn.Module]) -> torch.Tensor:
    """The attention term of each sample ``[B]``: the mean over ``inputs.layer_pairs``, which have a head map each."""
    recipe, batch = inputs.recipe, inputs.batch
    masks = (chosen_rows(batch, recipe.attention_rows), batch.vision_mask_BV)
    losses = []
    for (layer, teacher_layer), head_map in zip(inputs.layer_pairs, head_maps, strict=True):
        student, teacher = inputs.student_attention[layer], inputs.targets.attention[teacher_layer]
        if isinstance(head_map, HeadMean):
            student = head_map(student)
        losses.append(
            attention_distance(
                student, head_map(teacher), *masks, recipe.attention_distance, relative_to_uniform=recipe.normalise
            )
        )
    return torch.stack(losses).mean(dim=0)


def vision_terms(inputs: TermInputs, width_map: WidthAdapter) -> dict[str, torch.Tensor]:
    """``vision_all`` and, if the recipe has it, ``vision_focus``, of each sample ``[B]``."""
    recipe, targets, vision_mask_BV = inputs.recipe, inputs.targets, inputs.batch.vision_mask_BV
    assert targets.vision_BVD is not None
    student, teacher = width_map(inputs.student_vision_BVD, targets.vision_BVD)
    masks = {"vision_all": vision_mask_BV}
    if recipe.vision_focus > 0:
        masks["vision_focus"] = focus_mask(targets.attention[0], vision_mask_BV, recipe.focus_k)
    return {
        name: vision_loss(student, teacher, mask, vision_mask_BV, relative_to_variance=recipe.normalise)
        for name, mask in masks.items()
    }
