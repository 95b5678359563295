"""The evaluations of a run, from its plan and its opened inputs."""

from pathlib import Path
from typing import Any

from alignkd.models.loading import save_vlm
from alignkd.objective import Objective
from alignkd.pipeline.evaluate.running.answering import RunSettings
from alignkd.pipeline.feeding.dataset import TrainingSet
from alignkd.pipeline.runtime.processes import Processes
from alignkd.pipeline.runtime.signals import StopFlag
from alignkd.pipeline.training.evaluation.evaluation import Evaluation
from alignkd.pipeline.training.evaluation.open_held_out import open_held_out
from alignkd.pipeline.training.evaluation.plan import EvaluationPlan
from alignkd.pipeline.training.lora import write_adapter
from alignkd.pipeline.training.run_inputs import RunInputs
from alignkd.pipeline.training.student import all_parameters


def open_evaluation(
    plan: EvaluationPlan,
    inputs: RunInputs,
    training: TrainingSet,
    objective: Objective,
    peft_model: Any,
    processes: Processes,
    stop: StopFlag,
) -> Evaluation:
    """Open the held-out samples, and say which figure decides.

    Raises:
        AlignkdError: a file or a cache that cannot be used, or a figure that is not measured.
    """
    config, student = inputs.config, inputs.student

    def write(folder: Path) -> None:
        with all_parameters(student, config.deepspeed):
            if not processes.first:
                return
            if peft_model is None:
                save_vlm(student, folder / "student")
            else:
                write_adapter(peft_model, student, folder / "adapter")

    evaluation = Evaluation(
        plan,
        open_held_out(inputs, training, objective),
        RunSettings(template=inputs.template, prompt_date=training.preparer.encoder.prompt_date or None),
        Path(config.out),
        processes,
        stop,
        write,
    )
    evaluation.choose_best(config.keep_best, config.patience)
    return evaluation
