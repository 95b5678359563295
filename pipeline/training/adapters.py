"""What a run learned beside its student: the maps between teacher and student, learned weights, terms with parameters.

``OUT/adapters.safetensors``, in float32, by their names in the objective. A further run may start from them.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from alignkd.errors import ConfigError
from alignkd.objective import Objective
from alignkd.pipeline.runtime.files import replace_bytes
from alignkd.plain_files import read_plain

NAME = "adapters.safetensors"
_OF_STUDENT = "student."
_LARGEST = 4 * 2**30


def adapter_state(objective: Objective) -> dict[str, torch.Tensor]:
    """Everything of the objective that is not the student."""
    return {name: value for name, value in objective.state_dict().items() if not name.startswith(_OF_STUDENT)}


def save_adapters(objective: Objective, out: Path) -> None:
    """Write them, if there are any. With ZeRO-3, parameters must be gathered."""
    found = {name: value.detach().float().cpu().contiguous() for name, value in adapter_state(objective).items()}
    if found:
        replace_bytes(out / NAME, save(found))


def load_adapters(objective: Objective, run: Path) -> None:
    """Start from the adapters of a finished run.

    Raises:
        ConfigError: the run has none, or they are of another teacher, student or recipe.
    """
    path, wanted = run / NAME, adapter_state(objective)
    try:
        found = load(read_plain(path, _LARGEST))
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"--adapters-of {run}: {NAME} cannot be read ({error}); give the --out of a finished run of a recipe with a teacher"
        ) from error
    shapes, expected = ({name: tuple(value.shape) for name, value in some.items()} for some in (found, wanted))
    if differing := sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name)):
        name = differing[0]
        raise ConfigError(
            f"--adapters-of {run}: {name} is {shapes.get(name, 'not there')}, this run's {expected.get(name, 'not there')}: the"
            " teacher, the student or the recipe is another one"
        )
    objective.load_state_dict(found, strict=False)
