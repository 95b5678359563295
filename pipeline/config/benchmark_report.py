"""The configuration of ``alignkd benchmark report``."""

from dataclasses import dataclass

from alignkd.errors import ConfigError
from alignkd.settings import Settings, setting


@dataclass(frozen=True, kw_only=True)
class BenchmarkReportConfig(Settings):
    """What ``alignkd benchmark report`` is asked to do. ``outs``: the folders, which are no option."""

    outs: tuple[str, ...]
    to: str = setting(group="storage", help="Folder that report.html and report.md are written to.")
    resamples: int = setting(
        2000, group="advanced", at_least=100, at_most=100_000, help="Times that pictures are drawn again for an interval."
    )
    seed: int = setting(0, group="advanced", at_least=0, help="Seed of these draws: the same seed gives the same figures.")

    def check(self) -> None:
        """Refuse a page about nothing.

        Raises:
            ConfigError: no folder is given.
        """
        if not self.outs:
            raise ConfigError("no folder is given; name one or more --out folders of alignkd benchmark run")
