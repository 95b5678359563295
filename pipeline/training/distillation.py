"""The parts of a run of stage two, opened and checked as ``distill`` opens them, for use outside of its training loop."""

from collections.abc import Sequence
from dataclasses import dataclass

from alignkd.errors import DataError
from alignkd.inputs.batch import Batch
from alignkd.models.vlm import Vlm
from alignkd.objective import Objective
from alignkd.pipeline.config.distill import DistillConfig
from alignkd.pipeline.feeding.dataset import TrainingSet
from alignkd.pipeline.runtime.ranks import Worker
from alignkd.pipeline.training.run_inputs import check_options, open_data, open_inputs
from alignkd.pipeline.training.student import build_objective
from alignkd.pipeline.training.teacher_source import open_teachers
from alignkd.plugins import load_plugins
from alignkd.targets.batch_targets import Targets
from alignkd.targets.several import SeveralTargets


@dataclass(frozen=True)
class Distillation:
    """The student under its recipe, and its samples, each compared with its row in the cache when it is read."""

    student: Vlm
    objective: Objective
    data: TrainingSet

    def batch(self, samples: Sequence[int]) -> tuple[Batch, Targets | SeveralTargets]:
        """Some samples of ``data``, by their index, and the teacher's targets for them, on the student's device.

        Raises:
            DataError: none of them can be used; says why.
            CacheError: a row does not belong to its sample.
        """
        collated = self.data.collate(self.data.__getitems__(list(samples)))
        for failure in collated["failures"]:
            if failure.fatal or collated["batch"] is None:
                raise DataError(f"sample {failure.sample_id!r}: {failure.reason}")
        return collated["batch"].to(self.student.device), collated["targets"].to(self.student.device)


def open_distillation(config: DistillConfig) -> Distillation:
    """Open cache, student and data of a configuration, and build its objective; nothing is written and nothing trains.

    Raises:
        AlignkdError: bad input, or parts that do not belong together.
    """
    load_plugins(config.plugins)
    check_options(config)
    inputs = open_inputs(config, Worker())
    objective, _ = build_objective(inputs, open_teachers(inputs), processes=1)
    return Distillation(inputs.student, objective, open_data(inputs))
