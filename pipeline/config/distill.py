"""The configuration of stage two."""

from dataclasses import dataclass
from typing import Literal

from alignkd.errors import ConfigError
from alignkd.losses.recipes import RECIPES, Recipe
from alignkd.pipeline.config import shared
from alignkd.pipeline.config.shared import DTYPES
from alignkd.settings import setting

OptimizerName = Literal["adamw", "muon"]


@dataclass(frozen=True, kw_only=True)
class DistillConfig(shared.DataSettings):
    """What ``alignkd distill`` is asked to do.

    ``template`` and ``max_length`` default to the cache's; a template that the student does not know, to the student's own.
    ``batch_size`` and ``batch_tokens`` bound the micro-batch of one process. With an ``online_teacher``, a cache decides
    only the samples and their order.
    """

    student: str = setting(group="model", help="The student's checkpoint: a folder, or ORG/NAME[@REVISION].")
    cache: str | tuple[str, ...] | None = setting(
        None,
        group="data",
        help="The cache that cache-teacher wrote; may be repeated, one for each teacher. Not needed by recipes without a"
        " teacher, such as sft.",
    )
    cache_weight: tuple[float, ...] = setting(
        (),
        group="data",
        at_least=0,
        at_most=1e6,
        default_text="1",
        help="How much the teacher of each --cache counts for samples that several of them teach; once for each --cache.",
    )
    out: str = setting(group="storage", aliases=("output-dir",), help="Folder of the run.")
    recipe: Recipe = RECIPES["align-kd"]
    vision_input: str = setting(
        "auto",
        group="data",
        choices=("auto", "cache", "tower"),
        help="With a recipe whose projector is the teacher's: the student's vision tokens from the cache, which needs neither"
        " images nor tower, or from the tower; auto: from the cache where it can be.",
    )
    template: str | None = shared.template()
    max_length: int | None = setting(
        None,
        group="data",
        aliases=("model-max-length",),
        at_least=2,
        default_text="the cache's",
        help="Most token ids of a sample.",
    )
    epochs: float = setting(1.0, group="training", aliases=("num-train-epochs",), more_than=0, help="Passes over the data.")
    max_steps: int | None = setting(None, group="training", at_least=1, help="Optimizer steps, instead of --epochs.")
    batch_size: int | None = setting(
        None,
        group="training",
        aliases=("bs", "per-device-train-batch-size"),
        at_least=1,
        default_text="16, or as many as --batch-tokens allows",
        help="Samples per micro-batch and device.",
    )
    batch_tokens: int | None = setting(
        None, group="training", at_least=1, help="Positions per micro-batch and device, padding included."
    )
    group_by_length: bool = setting(
        True, group="training", help="Steps of samples of similar length: less padding. Their order mixes lengths."
    )
    gradient_accumulation: int = setting(
        1, group="training", aliases=("gradient-accumulation-steps",), at_least=1, help="Micro-batches per step and device."
    )
    learning_rate: float = setting(
        4e-5, group="training", aliases=("lr",), at_least=0, help="Peak learning rate; cosine decay to zero."
    )
    projector_learning_rate: float | None = setting(
        None,
        group="training",
        aliases=("projector-lr", "mm-projector-lr"),
        at_least=0,
        default_text="--learning-rate",
        help="Learning rate of the projector.",
    )
    optimizer: OptimizerName = setting(
        "adamw",
        group="training",
        aliases=("optim",),
        choices=("adamw", "muon"),
        help="muon: for the weight matrices of layers, adamw for the rest.",
    )
    muon_learning_rate: float = setting(
        0.02, group="training", aliases=("muon-lr",), at_least=0, help="Peak learning rate of Muon."
    )
    warmup: float = setting(
        0.03,
        group="training",
        aliases=("warmup-ratio",),
        at_least=0,
        at_most=0.999,
        help="Share of the steps in which the learning rate rises.",
    )
    weight_decay: float = setting(0.0, group="training", aliases=("wd",), at_least=0, help="Weight decay of the optimizer.")
    seed: int = shared.seed("Seed of the order of samples, of dropout and of new parameters.")
    dtype: str = shared.dtype("Dtype of the computation; trained weights stay float32.")
    gradient_checkpointing: bool = setting(False, group="training", help="Less memory, a third more time.")
    deepspeed: str | None = setting(
        None, group="many machines", metavar="NAME|FILE.json", help="ZeRO for many GPUs: zero1, zero2, zero3, or a FILE.json."
    )
    lora: bool = setting(
        False,
        group="training",
        help="Train low-rank updates of the decoder's layers, with projector and adapters, and merge them at the end.",
    )
    lora_rank: int = setting(64, group="training", aliases=("lora-r",), at_least=1, help="Rank of the updates.")
    lora_alpha: int = setting(128, group="training", at_least=1, help="The updates are multiplied by alpha / rank.")
    lora_dropout: float = setting(0.0, group="training", at_least=0, less_than=1, help="Dropout before the updates.")
    adapters_of: str | None = setting(
        None,
        group="training",
        metavar="RUN",
        help="Start the maps between teacher and student from those of a finished run, of the same teacher and recipe.",
    )
    online_teacher: str | None = setting(
        None,
        group="model",
        metavar="DIR|NAME",
        help="Run this teacher in the training loop instead of reading its targets from a cache.",
    )
    teacher_dtype: str | None = setting(
        None, group="model", choices=DTYPES, default_text="--dtype", help="Dtype of the online teacher."
    )
    cache_tower_features: bool = setting(False, help="Keep the frozen vision tower's features of all images in memory.")
    save_steps: int = setting(500, group="storage", at_least=1, help="Steps between checkpoints.")
    save_total_limit: int = setting(2, group="storage", at_least=2, help="Checkpoints kept.")
    log_steps: int = setting(
        10, group="general", aliases=("logging-steps",), at_least=1, help="Steps between lines of metrics.jsonl."
    )
    report_to: tuple[str, ...] = setting(
        ("tensorboard",), group="general", help="Tracker, by its name in transformers, or none; may be repeated."
    )
    term_gradients: bool = setting(False, help="Log the gradient norm of each term.")
    workers: int | None = setting(
        None,
        aliases=("num-workers", "dataloader-num-workers"),
        at_least=0,
        default_text="4 with a GPU, else 0",
        help="Loader processes.",
    )
    max_wait: float = setting(
        1800.0, at_least=1, help="Most seconds that a process waits for a loader or for another process; then the run ends."
    )
    eval_data: str | tuple[str, ...] | None = setting(
        None,
        group="evaluation",
        aliases=("val-data",),
        help="Held-out samples, in any form of --data: their loss while it trains. May be repeated.",
    )
    eval_cache: str | tuple[str, ...] | None = setting(
        None,
        group="evaluation",
        default_text="--cache, if it holds them",
        help="The cache of the teacher's targets for the held-out samples; once for each --cache, in its order.",
    )
    eval_images: str | None = setting(
        None, group="evaluation", default_text="--images", help="Folder of the held-out samples' images."
    )
    eval_steps: int | None = setting(
        None,
        group="evaluation",
        at_least=1,
        default_text="at the end alone",
        help="Steps between evaluations.",
    )
    eval_benchmark: tuple[str, ...] = setting(
        (),
        group="evaluation",
        metavar="NAME:N",
        help="Score N questions of a benchmark, the same all along: gqa:200; may be repeated.",
    )
    benchmark_root: str | None = setting(
        None, group="evaluation", metavar="DIR", help="Folder of the benchmarks' official files: see docs/benchmarks.md."
    )
    keep_best: str | None = setting(
        None,
        group="evaluation",
        metavar="NAME",
        help="Keep the best student so far in OUT/best, by supervised, loss, agreement, another term, or a benchmark's name.",
    )
    patience: int | None = setting(
        None, group="evaluation", at_least=1, help="Stop after this many evaluations in a row without a better --keep-best."
    )
    resume: bool = setting(False, group="storage", plain_flag=True, help="Continue from the last checkpoint in --out.")
    max_rejected: int | str = shared.max_rejected()
    device: str | None = shared.device()
    vision_tower: str | None = shared.vision_tower()
    download: bool = shared.download()
    plugins: tuple[str, ...] = shared.plugins()
    feature_bytes: int = 4 * 2**30

    def check(self) -> None:
        """Refuse settings that contradict each other.

        Raises:
            ConfigError: weights or held-out caches that do not go with the caches, or the same cache twice.
        """
        super().check()
        caches, held_out = shared.several(self.cache), shared.several(self.eval_cache)
        if len(set(caches)) < len(caches):
            twice = next(url for url in caches if caches.count(url) > 1)
            raise ConfigError(
                f"--cache {twice} is given twice: give the cache of each teacher once, its share with --cache-weight"
            )
        if self.cache_weight and len(self.cache_weight) != len(caches):
            raise ConfigError(
                f"--cache-weight is given {len(self.cache_weight)} times and --cache {len(caches)} times: give one for each"
                " --cache, in its order"
            )
        if self.cache_weight and not any(self.cache_weight):
            raise ConfigError("--cache-weight is 0 for every --cache: give at least one of them a weight above 0")
        if len(held_out) > max(len(caches), 1):
            raise ConfigError(
                f"--eval-cache is given {len(held_out)} times and --cache {len(caches)} times: give the held-out cache of each"
                " teacher, in the order of --cache, or none where the training caches hold the held-out samples"
            )

    @property
    def samples_at_once(self) -> int | None:
        """Samples per micro-batch; None where only positions bound them."""
        return self.batch_size or (None if self.batch_tokens else 16)
