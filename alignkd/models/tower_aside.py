"""The frozen tower in a file instead of in memory, while a student trains from vision tokens that are there already."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn

from alignkd.models.vlm import Vlm


@dataclass(frozen=True)
class TowerAside:
    """A tower that was taken out of its model: its module without memory, its name there, and the file of its weights."""

    tower: nn.Module
    name: str
    file: Path


class AbsentTower(nn.Module):
    """Stands where a tower was."""


def set_tower_aside(vlm: Vlm, file: Path, *, write: bool) -> None:
    """Free the memory of the model's tower; :func:`whole` puts it back from ``file``, which whoever saves must ``write``."""
    assert vlm.tower_aside is None
    tower = vlm.tower
    if write:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tower.state_dict().items()}, file)
    name = next(name for name, module in vlm.model.named_modules() if module is tower)
    vlm.model.set_submodule(name, AbsentTower())
    vlm.tower_aside = TowerAside(tower.to("meta"), name, file)


@contextmanager
def whole(vlm: Vlm) -> Iterator[None]:
    """Within it the model has its tower, to be saved; it cannot run."""
    aside = vlm.tower_aside
    if aside is None:
        yield
        return
    aside.tower.load_state_dict(load_file(aside.file), assign=True)
    vlm.model.set_submodule(aside.name, aside.tower)
    try:
        yield
    finally:
        vlm.model.set_submodule(aside.name, AbsentTower())
        aside.tower.to("meta")
