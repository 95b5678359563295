"""Every number of the demo, and where its parts lie."""

from dataclasses import dataclass, field
from pathlib import Path

from alignkd.pipeline.config import shared
from alignkd.pipeline.config.shared import SHARD_FORMATS
from alignkd.pipeline.config.targets import TargetSettings
from alignkd.settings import Settings, setting


@dataclass(frozen=True)
class LanguageModelSize:
    """Width, layers, heads and feed-forward width of a Llama."""

    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int


@dataclass(frozen=True)
class TowerTraining:
    """Size and training of the tower."""

    hidden_size: int = 128
    layers: int = 3
    heads: int = 4
    intermediate_size: int = 256
    patch_size: int = 8
    epochs: int = 14
    batch_size: int = 128
    learning_rate: float = 1e-3
    muon_learning_rate: float = 0.02


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Settings):
    """Every number of the demo."""

    out: str = setting(group="storage", help="Folder for everything the demo makes.")
    seed: int = shared.seed("Seed of the teacher, the students and the choice of labelled images.")
    shard_format: str = setting(
        "zarr", group="storage", flag="format", choices=SHARD_FORMATS, help="Shard format of the cache."
    )
    device: str | None = shared.device()
    labelled_share: float = 0.03
    tower: TowerTraining = field(default_factory=TowerTraining)
    teacher: LanguageModelSize = field(default_factory=lambda: LanguageModelSize(128, 4, 4, 344))
    student: LanguageModelSize = field(default_factory=lambda: LanguageModelSize(48, 2, 4, 128))
    teacher_steps: int = 700
    student_steps: int = 600
    batch_size: int = 128
    teacher_learning_rate: float = 1e-3
    student_learning_rate: float = 2e-3
    focus_k: int = 4
    group_by_length: bool = True
    arms: tuple[str, ...] = ("sft", "align-kd")
    targets: TargetSettings = field(default_factory=TargetSettings)


@dataclass
class Paths:
    """Where the demo's parts lie."""

    out: Path

    def __post_init__(self) -> None:
        self.data, self.cache = self.out / "data", self.out / "cache"
        self.tokenizer, self.student_start = self.out / "tokenizer", self.out / "student-start"
        self.teacher_start, self.teacher_run = self.out / "teacher-start", self.out / "teacher"
        self.teacher = self.teacher_run / "student"

    def student_run(self, arm: str) -> Path:
        """The run of one student."""
        return self.out / f"student-{arm}"
