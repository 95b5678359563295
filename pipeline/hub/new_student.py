"""A student's folder from a language model, a vision tower and a projector."""

from pathlib import Path
from typing import Any

from alignkd.errors import ConfigError
from alignkd.models.join_parts import join_parts
from alignkd.models.loading import describe_vlm, save_vlm
from alignkd.pipeline.config.students import NewStudentConfig
from alignkd.pipeline.hub.models import model_folder, pin_models
from alignkd.pipeline.hub.snapshots import TOWER
from alignkd.pipeline.runtime.devices import parse_dtype
from alignkd.pipeline.runtime.files import check_out_folder
from alignkd.pipeline.runtime.out_folder.write_faults import explained_write_faults
from alignkd.pipeline.runtime.run_record import write_run_record


def new_student(config: NewStudentConfig) -> dict[str, Any]:
    """Write the student, in Hugging Face form, and how it was made; figures of it.

    Raises:
        ConfigError: the folder is not empty.
        CheckpointError: a part cannot be read, is of another architecture, or does not belong to the others.
    """
    out = Path(config.out)
    check_out_folder(out)
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"--out {out} is not empty; choose a new folder")
    config = pin_models(config)
    vlm = join_parts(
        model_folder(config.language_model),
        model_folder(config.tower, TOWER),
        config.projector,
        grid=config.grid,
        seed=config.seed,
        dtype=None if config.dtype is None else parse_dtype(config.dtype),
        projector_file=None if config.projector_from is None else Path(config.projector_from),
    )
    with explained_write_faults(out, "the student"):
        save_vlm(vlm, out)
        write_run_record(out / "new-student.json", "new-student", vars(config))
    describe_vlm(out)  # what cannot be loaded is told here
    weights = {name: sum(p.numel() for p in part.parameters()) for name, part in _parts(vlm).items()}
    return {
        "student": str(out),
        "family": vlm.family,
        "projector": config.projector,
        "vision_tokens_per_image": vlm.vision_tokens_per_image,
        "hidden_size": vlm.hidden_size,
        "layers": vlm.layers,
        "vocabulary": vlm.vocabulary,
        "dtype": str(vlm.dtype).removeprefix("torch."),
        "parameters": weights,
    }


def _parts(vlm: Any) -> dict[str, Any]:
    return {"language model": vlm.decoder, "output head": vlm.model.lm_head, "tower": vlm.tower, "projector": vlm.projector}
