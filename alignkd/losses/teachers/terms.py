"""The adapters of one teacher, and its terms that are averaged within a sample.

Shapes: as in :mod:`alignkd.losses.contract`.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from alignkd.inputs.batch import Batch, Counts
from alignkd.losses.adapters import WidthAdapter, make_head_map
from alignkd.losses.attention_and_vision import attention_term, vision_terms
from alignkd.losses.contract import SampleTerm, TeacherShape, TermInputs, TermShapes
from alignkd.losses.extra_terms import ExtraTerms
from alignkd.losses.recipes import Recipe
from alignkd.targets.batch_targets import DecodedTargets
from alignkd.targets.logits import LogitCodec

LayerPairs = tuple[tuple[int, int], ...]


class TeacherTerms(nn.Module):
    """Maps one teacher's targets to the student, and compares the two. A subclass calls :meth:`add_adapters`.

    ``layer_pairs``: each compared layer of the student, with the teacher's that matches it.
    """

    head_map: nn.Module | None
    other_head_maps: nn.ModuleList
    width_map: WidthAdapter | None
    layer_pairs: LayerPairs
    extra_terms: ExtraTerms

    def add_adapters(self, recipe: Recipe, shapes: TermShapes, layer_pairs: LayerPairs) -> None:
        """Build what maps the teacher's heads and width.

        Raises:
            ConfigError: the targets hold only the head mean, but the recipe compares heads.
        """
        teacher, self.layer_pairs = shapes.teacher, layer_pairs
        self.head_map, self.other_head_maps, self.width_map = None, nn.ModuleList(), None
        if recipe.attention > 0 and teacher is not None:
            maps = [make_head_map(recipe.head_map, teacher.heads, shapes.student_heads) for _ in layer_pairs]
            self.head_map, self.other_head_maps = maps[0], nn.ModuleList(maps[1:])
        if recipe.vision > 0 and teacher is not None:
            self.width_map = WidthAdapter(teacher.width, shapes.student_width, recipe.width_map)

    def sample_terms(self, inputs: TermInputs, counts: Counts, *, keep_parameters_in_graph: bool) -> dict[str, SampleTerm]:
        """The terms that are averaged within a sample: attention, vision, then those from outside the package."""
        recipe, found = inputs.recipe, {}
        if self.head_map is not None and recipe.attention > 0:
            value_B = attention_term(inputs, [self.head_map, *self.other_head_maps])
            found["attention"] = SampleTerm.of(value_B, counts.with_text_after_image)
        if self.width_map is not None and recipe.vision > 0:
            for name, value_B in vision_terms(inputs, self.width_map).items():
                found[name] = SampleTerm.of(value_B, counts.with_image)
        if recipe.extra_terms:
            found |= self.extra_terms(inputs, counts, keep_parameters_in_graph=keep_parameters_in_graph)
        return found


class OtherTeacher(TeacherTerms):
    """A teacher of an objective beside its first.

    ``shape``: the teacher's. ``logit_codec`` reads its targets of answers. ``source``, of the kind that the objective has,
    makes its targets in the loop.
    """

    def __init__(
        self, recipe: Recipe, shapes: TermShapes, layer_pairs: LayerPairs, logit_codec: LogitCodec | None, source: Any
    ) -> None:
        """Build the adapters, and the terms that have parameters.

        Raises:
            ConfigError: the targets hold only the head mean, but the recipe compares heads.
        """
        super().__init__()
        self.shape, self.logit_codec, self.source = shapes.teacher, logit_codec, source
        self.add_adapters(recipe, shapes, layer_pairs)
        self.extra_terms = ExtraTerms(recipe, shapes)


def no_targets(batch: Batch, teacher: TeacherShape | None, layers: LayerPairs) -> DecodedTargets:
    """Targets of a teacher that teaches no sample of a batch: zeros, all of them masked.

    The terms then give zero and reach every adapter, as they do in a batch of text alone.
    """
    masked = DecodedTargets(
        row_mask_BT=torch.zeros_like(batch.text_mask_BT), column_mask_BV=torch.zeros_like(batch.vision_mask_BV)
    )
    if teacher is None:
        return masked
    device, (samples, rows), columns = batch.input_ids_BS.device, batch.text_rows_BT.shape, batch.vision_columns_BV.shape[1]
    attention_BHTV = torch.zeros(samples, teacher.heads, rows, columns, device=device)
    needed = {matching for _, matching in layers} | {0}
    return replace(
        masked,
        attention=dict.fromkeys(needed, attention_BHTV),
        vision_BVD=torch.zeros(samples, columns, teacher.width, device=device),
    )
