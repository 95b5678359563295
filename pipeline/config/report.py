"""The configuration of ``alignkd report``."""

from dataclasses import dataclass

from alignkd.errors import ConfigError
from alignkd.pipeline.config import shared
from alignkd.settings import Settings, setting


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Settings):
    """What ``alignkd report`` is asked to do. ``runs``: the folders, which are no option."""

    runs: tuple[str, ...]
    to: str = setting(group="storage", help="Folder that report.html is written to.")
    predictions: tuple[str, ...] = setting(
        (),
        group="data",
        metavar="DIR",
        help="The --out of an evaluate or benchmark run whose answers are shown; may be repeated, one for each run in order."
        " [default: RUN/evaluation, RUN/evaluate or RUN/test]",
    )
    samples: int = setting(
        4, group="data", at_least=0, at_most=64, help="Samples whose attention is drawn. 0: no model is loaded."
    )
    shown_answers: int = setting(12, group="data", flag="answers", at_least=0, at_most=500, help="Predictions that are shown.")
    data: str | None = setting(
        None, group="data", aliases=("data-path",), default_text="the run's", help="Data file of the samples."
    )
    images: str | None = setting(
        None,
        group="data",
        aliases=("image-folder", "image-dir"),
        default_text="the run's",
        help="Folder that image paths are relative to.",
    )
    cache: str | None = setting(None, group="data", default_text="the run's", help="The cache, where it was moved.")
    dtype: str = shared.dtype("Dtype of the models.")
    device: str | None = shared.device()
    vision_tower: str | None = shared.vision_tower()
    download: bool = shared.download()
    plugins: tuple[str, ...] = shared.plugins()

    def check(self) -> None:
        """Refuse a page about nothing, and predictions that belong to no run.

        Raises:
            ConfigError: says which.
        """
        if not self.runs:
            raise ConfigError("no run is given; name one or more --out folders of alignkd distill")
        if len(self.predictions) > len(self.runs):
            raise ConfigError(
                f"--predictions is given {len(self.predictions)} times for {len(self.runs)} runs; give it once for each run"
            )
