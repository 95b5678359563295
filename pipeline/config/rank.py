"""The configuration of ``alignkd cache rank``."""

from dataclasses import dataclass

from alignkd.errors import ConfigError
from alignkd.pipeline.config import shared
from alignkd.settings import setting


@dataclass(frozen=True, kw_only=True)
class RankConfig(shared.DataSettings):
    """What ``alignkd cache rank`` is asked to do; ``cache`` is its argument."""

    cache: str
    by: str | None = setting(
        None,
        group="data",
        choices=("advantage", "divergence"),
        default_text="divergence with --student, else advantage",
        help="What samples are ranked by, largest first.",
    )
    top: int | str | None = setting(
        None, group="data", at_least=1, or_share=True, metavar="N|P%", default_text="all", help="Keep the first so many."
    )
    out: str | None = setting(
        None,
        group="storage",
        metavar="FILE",
        help="Write the samples kept: with --data as a data file in its order (.json or .jsonl), without as JSON lines of ids"
        " and figures, best first; FILE.txt: their keys alone. Images must have paths, unless keys alone are written.",
    )
    student: str | None = setting(
        None,
        group="model",
        help="The student, a folder or ORG/NAME[@REVISION]: rank by how far its answers are from the teacher's.",
    )
    data: str | tuple[str, ...] = setting(
        (), group="data", aliases=("data-path",), default_text="all rows", help="The data of the cache, or some of it."
    )
    recipe: str = setting(
        "align-kd", group="training", metavar="NAME|FILE.yaml", help="Recipe whose answer divergence compares the two."
    )
    batch_size: int = setting(16, group="model", aliases=("bs",), at_least=1, help="Samples at a time.")
    dtype: str = shared.dtype("Dtype of the student's matrix products.")
    device: str | None = shared.device()
    max_rejected: int | str = shared.max_rejected()
    vision_tower: str | None = shared.vision_tower()
    download: bool = shared.download()
    plugins: tuple[str, ...] = shared.plugins()

    def check(self) -> None:
        """Refuse a student without data, and options that need data without it.

        Raises:
            ConfigError: names them.
        """
        super().check()
        if self.student is not None and not self.data:
            raise ConfigError("--student answers the samples of the cache: give its --data and --images")
        if self.by == "divergence" and self.student is None:
            raise ConfigError("--by divergence compares a student with the teacher: give --student, --data and --images")
        for option in ("images", "limit", "sample"):
            if not self.data and getattr(self, option) is not None:
                raise ConfigError(f"--{option} belongs to --data, which is not given")

    @property
    def ranked_by(self) -> str:
        """``advantage`` or ``divergence``."""
        return self.by or ("divergence" if self.student is not None else "advantage")
