"""What a loss term is given and what it returns.

Shapes: B samples, H student heads, T text rows, V vision columns, D student width, A answers.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from alignkd.errors import ConfigError
from alignkd.inputs.batch import Batch
from alignkd.losses.recipes import Recipe
from alignkd.targets.batch_targets import DecodedTargets
from alignkd.targets.logits import LogitCodec


@dataclass(frozen=True)
class TeacherShape:
    """The teacher's heads (1 for a head mean), its width, and how many layers it has.

    ``layers`` may be None where only the first layer is compared.
    """

    heads: int
    width: int
    layers: int | None = None


@dataclass(frozen=True)
class TermShapes:
    """The shapes that a term with parameters is built for; ``teacher`` is None where no teacher is used."""

    student_heads: int
    student_width: int
    student_layers: int
    teacher: TeacherShape | None


@dataclass(frozen=True)
class TermInputs:
    """One batch, as every term sees it.

    ``batch``: its masks are False at text rows and vision columns that have no target. ``targets``: the teacher's, all tensors.
    ``student_attention``: ``[B, H, T, V]`` by the student's layer, with gradient; those of ``layer_pairs``, if the recipe
    compares attention. ``student_vision_BVD``: vision tokens, and ``student_hidden_AD``: last hidden states at the positions
    that predict answer tokens; both with gradient.
    ``layer_pairs``: each compared layer of the student, with the teacher's layer that matches it.
    ``logit_codec``: reads ``targets.answers``; None without logit targets.
    """

    batch: Batch
    targets: DecodedTargets
    student_attention: Mapping[int, torch.Tensor]
    student_vision_BVD: torch.Tensor
    student_hidden_AD: torch.Tensor
    recipe: Recipe
    layer_pairs: tuple[tuple[int, int], ...] = ()
    logit_codec: LogitCodec | None = None


@dataclass(frozen=True)
class SampleTerm:
    """A term of each sample, ``value_B``, and the number of samples of the step that it is averaged over.

    ``bad_B``: the samples for which it is not finite.
    """

    value_B: torch.Tensor
    samples: float
    bad_B: torch.Tensor

    @classmethod
    def of(cls, value_B: torch.Tensor, samples: float) -> "SampleTerm":
        """A term whose values all count."""
        return cls(value_B, samples, ~value_B.detach().isfinite())


def check_teacher_given(recipe: Recipe, teacher: TeacherShape | None, logit_codec: LogitCodec | None) -> None:
    """Refuse a recipe for which something about the teacher is missing.

    Raises:
        ConfigError: names it.
    """
    if teacher is None and recipe.needs & {"attention", "vision"}:
        raise ConfigError(f"recipe {recipe.name!r} compares attention or vision tokens: give the teacher's TeacherShape")
    if logit_codec is None and recipe.divergences:
        raise ConfigError(f"recipe {recipe.name!r} has the logit terms {', '.join(recipe.divergences)}: give a logit_codec")


def check_targets_given(recipe: Recipe, targets: DecodedTargets) -> None:
    """Refuse a batch without targets that the recipe needs.

    Raises:
        ConfigError: names them.
    """
    given = {"attention": bool(targets.attention), "vision": targets.vision_BVD is not None, "logits": bool(targets.answers)}
    given["advantage"] = targets.advantage_A is not None
    if missing := [name for name in sorted(recipe.needs) if not given[name]]:
        raise ConfigError(f"recipe {recipe.name!r} needs targets that this batch does not have: {', '.join(missing)}")
