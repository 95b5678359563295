"""What an objective needs to know of a teacher, and where its targets come from if a batch does not bring them."""

from typing import NamedTuple, Protocol

from alignkd.inputs.batch import Batch
from alignkd.losses.contract import TeacherShape
from alignkd.models.vlm import Vlm
from alignkd.targets.batch_targets import DecodedTargets
from alignkd.targets.logits import LogitCodec


class TargetSource(Protocol):
    """Computes targets for each batch, in place of a cache's rows: a slice of the teacher, or the whole teacher."""

    @property
    def shares_tower(self) -> bool:
        """Whether it takes the features of the student's tower."""

    def fill(self, student: Vlm, batch: Batch, targets: DecodedTargets, needs: frozenset[str]) -> tuple[Batch, DecodedTargets]:
        """Add the targets of ``needs`` that it computes; where both share a tower, the batch then carries its features."""


class Teacher(NamedTuple):
    """A teacher. ``source`` makes targets in the loop, None where batches bring all of them."""

    source: TargetSource | None
    logit_codec: LogitCodec | None
    shape: TeacherShape | None
