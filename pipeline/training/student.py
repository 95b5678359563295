"""The student's way through a run: into the objective, and out to disk."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from alignkd.capture.teacher import Teacher
from alignkd.models.loading import save_vlm
from alignkd.models.vlm import Vlm
from alignkd.objective import Objective
from alignkd.pipeline.runtime.devices import parse_dtype
from alignkd.pipeline.training.adapters import load_adapters, save_adapters
from alignkd.pipeline.training.lora import LoraSettings, add_lora, merge_lora
from alignkd.pipeline.training.run_inputs import RunInputs
from alignkd.pipeline.training.training_arguments import zero_stage


def build_objective(inputs: RunInputs, teachers: Sequence[Teacher], *, processes: int) -> tuple[Objective, Any]:
    """The objective around the student, and the PEFT model with ``--lora``, else None.

    Call it before DeepSpeed changes what the student's modules are.

    Raises:
        ConfigError: the recipe cannot be used with this student, or the adapters to start from are others.
    """
    config, student, first = inputs.config, inputs.student, teachers[0]
    objective = Objective(
        student,
        config.recipe,
        first.shape,
        first.source,
        first.logit_codec,
        teachers[1:],
        keep_all_parameters_in_graph=processes > 1,
    )
    if config.adapters_of is not None:
        load_adapters(objective, Path(config.adapters_of))
    if config.gradient_checkpointing:
        objective.recompute_activations()
    if not config.lora:
        return objective, None
    if config.dtype != "float32":
        student.model.to(parse_dtype(config.dtype))  # frozen weights need no higher precision
    peft_model = add_lora(student, LoraSettings(config.lora_rank, config.lora_alpha, config.lora_dropout))
    student.freeze_tower()
    return objective, peft_model


def save_student(objective: Objective, peft_model: Any, out: Path, *, deepspeed: str | None, first: bool) -> Path:
    """Write the student in Hugging Face form and, if its family has one, in the official layout; and the adapters beside it.

    Returns the first folder.

    Every process calls it, as ZeRO-3 gathers parameters from all of them; the ``first`` writes. With ``peft_model`` the
    adapter is written, too, and then merged into the weights.
    """
    student = objective.vlm
    with all_parameters(student, deepspeed, objective):
        if first:
            save_adapters(objective, out)
            student.model.eval()
            if peft_model is not None:
                merge_lora(peft_model, student, out / "adapter")
            save_vlm(student, out / "student")
            if student.has_official_layout:
                save_vlm(student, out / "student-official", official=True)
    return out / "student"


def all_parameters(student: Vlm, deepspeed: str | None, objective: Objective | None = None) -> AbstractContextManager[Any]:
    """Within it the first process has every parameter whole: ZeRO-3 gathers them. Every process enters it.

    With ``objective``, its adapters are among them.
    """
    if zero_stage(deepspeed) != 3:
        return nullcontext()
    import deepspeed as library

    gathered: AbstractContextManager[Any] = library.zero.GatheredParameters(list((objective or student.model).parameters()))
    return gathered
