"""The configuration of ``alignkd answer``."""

from dataclasses import dataclass
from pathlib import Path

from alignkd.errors import ConfigError
from alignkd.pipeline.config import shared
from alignkd.pipeline.config.benchmark import BATCH_TOKENS
from alignkd.settings import setting

SUFFIXES = (".jsonl", ".json")


@dataclass(frozen=True, kw_only=True)
class AnswerConfig(shared.DataSettings):
    """What ``alignkd answer`` is asked to do."""

    model: str = setting(group="model", help="The teacher, or a student: a folder, or ORG/NAME[@REVISION].")
    out: str = setting(
        group="storage",
        metavar="FILE",
        help="Data file that is written: JSON lines for .jsonl, a list for .json. What an unfinished run needs is in FILE.run.",
    )
    n: int = setting(1, group="data", at_least=1, at_most=1000, help="Answers to each sample; several need --temperature.")
    temperature: float = setting(
        0.0, group="model", at_least=0, help="0: the likeliest token each time; else tokens are drawn at this temperature."
    )
    top_p: float = setting(
        1.0,
        group="model",
        more_than=0,
        at_most=1,
        help="With --temperature: draw from the likeliest tokens that make this share.",
    )
    max_new_tokens: int = setting(512, group="model", at_least=1, help="Most tokens of an answer.")
    keep_cut: bool = setting(
        False, group="data", help="Keep answers that --max-new-tokens cuts, marked as not finished; else they are left out."
    )
    seed: int = shared.seed("Seed of the tokens that are drawn.")
    template: str | None = shared.template()
    prompt_date: str | None = shared.prompt_date()
    batch_tokens: int = setting(
        BATCH_TOKENS, group="model", at_least=1, help="Positions of a batch: its longest question times its questions."
    )
    dtype: str = shared.dtype("Dtype of the model.")
    max_rejected: int | str = shared.max_rejected()
    device: str | None = shared.device()
    vision_tower: str | None = shared.vision_tower()
    download: bool = shared.download()
    plugins: tuple[str, ...] = shared.plugins()

    def check(self) -> None:
        """Refuse settings that contradict each other.

        Raises:
            ConfigError: several equal answers are asked for; or a file in another format, or none.
        """
        super().check()
        if self.n > 1 and not self.temperature:
            raise ConfigError(f"--n {self.n} with --temperature 0 gives the same answer {self.n} times: give a temperature")
        if Path(self.out).suffix not in SUFFIXES:
            raise ConfigError(f"--out {self.out}: expected the name of a file that ends in {' or '.join(SUFFIXES)}")
