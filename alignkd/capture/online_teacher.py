"""The whole teacher in the training loop: the targets of a cache, by the same capture, without a codec.

Stage two is measured against this, which needs the memory of both models and the time of both forward passes.

Shapes: as in :mod:`alignkd.targets.batch_targets`.
"""

from collections.abc import Collection
from dataclasses import replace

import torch

from alignkd.capture.advantage import advantages
from alignkd.capture.attention import capture, enable_capture
from alignkd.capture.teacher_slice import same_tower, slice_config
from alignkd.errors import ConfigError
from alignkd.inputs.batch import Batch
from alignkd.models.vlm import Vlm, module_fingerprint
from alignkd.targets.batch_targets import DecodedTargets
from alignkd.targets.logits import LogitSettings
from alignkd.targets.logits.dense import Hidden


class OnlineTeacher:
    """A :class:`~alignkd.objective.TargetSource` that runs the teacher over every batch.

    Not an ``nn.Module``, so that it does not become part of a student's checkpoint. Where both towers have the same hash, the
    student's features serve both.
    """

    def __init__(
        self, teacher: Vlm, student: Vlm, *, features_only: bool = False, attention_layers: Collection[int] = (0,)
    ) -> None:
        """``features_only``: batches will carry the student's tower features, no pixel values.

        ``attention_layers``: the teacher's layers whose attention is a target.

        Raises:
            ConfigError: the teacher has another tower, which needs the images.
        """
        self.teacher, self.attention_layers = teacher, attention_layers
        teacher.model.requires_grad_(False).eval()
        enable_capture(teacher)
        self.shares_tower = teacher.caches_tower and same_tower(
            student, slice_config(teacher.model), module_fingerprint(teacher.tower, teacher.dtype), teacher.dtype
        )
        if features_only and not self.shares_tower:
            raise ConfigError(
                "--cache-tower-features keeps the features of the student's tower, but the teacher's tower is another and needs"
                " the images: leave the option out"
            )

    @property
    def logit_codec(self) -> Hidden:
        """Gives every logit of the teacher, from unchanged last hidden states."""
        head_ND, bias_N = self.teacher.head.weight.detach(), self.teacher.head.bias
        tensors = {
            "output_head": head_ND,
            "output_bias": head_ND.new_zeros(len(head_ND)) if bias_N is None else bias_N.detach(),
            "feature_scale": head_ND.new_ones(head_ND.shape[1]),
        }
        return Hidden(LogitSettings("hidden", hidden_bits=16), tensors)

    @torch.no_grad()
    def fill(self, student: Vlm, batch: Batch, targets: DecodedTargets, needs: frozenset[str]) -> tuple[Batch, DecodedTargets]:
        """See :class:`alignkd.objective.TargetSource`. Advantages need batches that hold their samples destroyed, too."""
        if self.shares_tower and batch.images.dim() == 4:
            batch = replace(batch, images=student.run_tower(batch.images))
        with torch.autocast(batch.input_ids_BS.device.type, enabled=False):
            captured = capture(self.teacher, batch, attention="attention" in needs, layers=self.attention_layers)
            advantage_A = advantages(self.teacher, batch, captured.hidden_AD) if "advantage" in needs else None
        return batch, replace(
            targets,
            attention=captured.attention,
            vision_BVD=captured.vision_BVD.float() if "vision" in needs else None,
            answers={"hidden": captured.hidden_AD} if "logits" in needs else {},
            advantage_A=advantage_A,
        )
