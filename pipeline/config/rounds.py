"""The configuration of ``alignkd rounds``."""

from dataclasses import dataclass

from alignkd.pipeline.config.shared import DataSettings, seed
from alignkd.settings import setting

SECTIONS = ("answer", "cache-teacher", "distill")
"""The commands that a round runs: each takes its options from the section of its name in the settings file."""


@dataclass(frozen=True, kw_only=True)
class RoundsConfig(DataSettings):
    """What ``alignkd rounds`` is asked to do. ``data`` are the prompts, and the answers that the student learns from too."""

    out: str = setting(
        group="storage", aliases=("output-dir",), help="Folder of all rounds: answers, caches, runs, and the last student."
    )
    rounds: int = setting(3, group="training", at_least=1, at_most=1000, help="How often the student answers and learns.")
    on_policy_share: float = setting(
        0.3,
        group="training",
        more_than=0,
        at_most=1,
        help="Share of the prompts that the student answers in a round, and of the samples of a round that are its answers.",
    )
    cache: str | None = setting(
        None,
        group="storage",
        default_text="OUT/cache, written first",
        help="A cache of --data that cache-teacher wrote.",
    )
    launch: str = setting(
        "",
        group="many machines",
        metavar="WORDS",
        help="What starts a command on several processes, such as 'torchrun --nproc-per-node 8 -m'.",
    )
    seed: int = seed("Seed of the prompts, of the answers, and of training.")
    resume: bool = setting(False, group="storage", plain_flag=True, help="Continue what is in --out.")
