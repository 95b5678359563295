"""The configuration of stage one."""

from dataclasses import dataclass

from alignkd.pipeline.config import shared
from alignkd.pipeline.config.cache_layout import ALIGNMENTS
from alignkd.pipeline.config.shared import ANSWERS, DEFAULT_MAX_LENGTH, SHARD_FORMATS, Answers
from alignkd.pipeline.config.targets import TargetSettings
from alignkd.settings import setting


@dataclass(frozen=True, kw_only=True)
class CacheTeacherConfig(shared.DataSettings):
    """What ``alignkd cache-teacher`` is asked to do. ``attention_layers``: see :mod:`alignkd.losses.layers`.

    ``append``: as ``alignkd cache append``, to a cache that exists, the samples of the data that it lacks.
    """

    teacher: str = setting(group="model", help="The teacher's checkpoint: a folder, or ORG/NAME[@REVISION].")
    answers: Answers = setting(
        "both",
        group="data",
        choices=ANSWERS,
        help="Samples whose answers are the data's own, those that this teacher wrote (alignkd answer), or all.",
    )
    cache: str = setting(group="storage", help="Where the cache is written: a folder, or a URL such as s3://bucket/cache.")
    template: str | None = shared.template()
    prompt_date: str | None = shared.prompt_date()
    max_length: int = setting(
        DEFAULT_MAX_LENGTH,
        group="data",
        aliases=("model-max-length",),
        at_least=2,
        help="Most token ids of a sample (an image counts as one); longer samples are cut.",
    )
    shard_format: str = setting("zarr", group="storage", flag="format", choices=SHARD_FORMATS, help="Shard format.")
    settings: TargetSettings = setting(factory=TargetSettings, nested=True)
    attention_layers: str = setting(
        "first",
        group="targets",
        help="Layers whose attention is stored: first, last, middle, all, or numbers such as 0,15,31; with @24, the layers"
        " that a student of 24 layers needs.",
    )
    alignment: str = setting(
        "targets",
        group="targets",
        choices=ALIGNMENTS,
        help="Store attention and vision tokens of every sample, or, once, the part of the teacher that recomputes them.",
    )
    slice_without_tower: bool = setting(
        False,
        group="targets",
        help="With --alignment slice: do not store the vision tower, because the student has the same one.",
    )
    student: str | None = setting(
        None,
        group="model",
        metavar="DIR|NAME",
        help="Checkpoint of the student-to-be: refuse, before the teacher is loaded, what distill would refuse.",
    )
    recipe: str | None = setting(
        None,
        group="targets",
        metavar="NAME|FILE.yaml",
        help="Recipe of distill: refuse targets that it lacks. [default: align-kd with --student, else none]",
    )
    shard_samples: int = setting(512, group="storage", at_least=1, help="Samples per shard: the unit of work and of resuming.")
    batch_tokens: int = setting(16_384, at_least=1, help="Positions per forward pass, padding included.")
    dtype: str = shared.dtype("Dtype of the teacher.")
    max_rejected: int | str = shared.max_rejected()
    device: str | None = shared.device()
    vision_tower: str | None = shared.vision_tower()
    download: bool = shared.download()
    calibration_from: str | None = setting(
        None,
        group="storage",
        metavar="URL",
        help="Another cache of this teacher and these settings, whose calibration is taken over: alignkd cache merge joins"
        " caches of one calibration.",
    )
    rank: int | None = setting(
        None,
        group="many machines",
        at_least=0,
        default_text="from torchrun, SLURM or Kubernetes, else 0",
        help="Number of this worker.",
    )
    world_size: int | None = setting(
        None, group="many machines", at_least=1, default_text="likewise, else 1", help="Number of workers."
    )
    steal: bool = setting(
        False, group="many machines", help="When its own shards are done, a worker takes shards that others have not done yet."
    )
    host_threads: int = setting(4, at_least=1, help="Threads that read images ahead of the teacher.")
    plugins: tuple[str, ...] = shared.plugins()
    append: bool = False

    @property
    def job(self) -> str:
        """The command that this is, in words."""
        return "cache append" if self.append else "cache-teacher"
