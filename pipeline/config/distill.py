"""The configuration of stage two."""

from dataclasses import dataclass, field
from typing import Literal

from alignkd.losses.recipes import Recipe

OptimizerName = Literal["adamw", "muon"]


@dataclass(frozen=True)
class DistillConfig:
    """What ``alignkd distill`` was asked to do. ``template`` and ``max_length`` default to the cache's, a template that the
    student does not know to its own.

    ``batch_size`` and ``batch_tokens`` (padded positions) bound the samples of a process's micro-batch. With an
    ``online_teacher`` a cache decides the samples and their order alone.
    """

    student: str
    data: str
    images: str | None
    out: str
    recipe: Recipe
    cache: str | None = None
    online_teacher: str | None = None
    teacher_dtype: str | None = None
    template: str | None = None
    max_length: int | None = None
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int | None = None
    batch_tokens: int | None = None
    group_by_length: bool = False
    gradient_accumulation: int = 1
    learning_rate: float = 4e-5
    projector_learning_rate: float | None = None
    optimizer: OptimizerName = "adamw"
    muon_learning_rate: float = 0.02
    warmup: float = 0.03
    weight_decay: float = 0.0
    seed: int = 0
    dtype: str = "float32"
    device: str | None = None
    deepspeed: str | None = None
    lora: bool = False
    lora_rank: int = 64
    lora_alpha: int = 128
    lora_dropout: float = 0.0
    gradient_checkpointing: bool = False
    save_steps: int = 500
    save_total_limit: int = 2
    log_steps: int = 10
    report_to: tuple[str, ...] = ("tensorboard",)
    term_gradients: bool = False
    workers: int | None = None
    resume: bool = False
    cache_tower_features: bool = False
    vision_tower: str | None = None
    max_rejected: int = 100
    feature_bytes: int = field(default=4 * 2**30)

    @property
    def samples_at_once(self) -> int | None:
        """Samples a micro-batch; None where only positions bound them."""
        return self.batch_size or (None if self.batch_tokens else 16)
