"""The configuration of ``alignkd chat``."""

from dataclasses import dataclass

from alignkd.errors import ConfigError
from alignkd.pipeline.config import shared
from alignkd.settings import Settings, setting


@dataclass(frozen=True, kw_only=True)
class ChatConfig(Settings):
    """What ``alignkd chat`` is asked to do. ``model``: folder or name of a checkpoint."""

    model: str
    image: tuple[str, ...] = setting(
        (), group="data", metavar="FILE", help="Picture that the first question is about; may be repeated."
    )
    prompt: tuple[str, ...] = setting(
        (),
        group="data",
        metavar="TEXT",
        help="A question; may be repeated. Without it, standard input holds them.",
    )
    system: str | None = setting(
        None, group="data", metavar="TEXT", help="Text of a system turn before the first question, where the template has them."
    )
    template: str | None = shared.template()
    prompt_date: str | None = shared.prompt_date()
    max_length: int | None = setting(
        None, group="data", default_text="the model's", at_least=2, help="Most positions of a conversation, answers included."
    )
    max_new_tokens: int = setting(512, group="model", at_least=1, help="Most tokens of an answer.")
    temperature: float = setting(0.0, group="model", at_least=0, help="0: the likeliest token each time; above 0: sampled.")
    top_p: float = setting(1.0, group="model", more_than=0, at_most=1, help="Sample from the likeliest tokens of this share.")
    seed: int = shared.seed("Seed of what is sampled.")
    dtype: str = shared.dtype("Dtype of the model.")
    device: str | None = shared.device()
    vision_tower: str | None = shared.vision_tower()
    download: bool = shared.download()
    plugins: tuple[str, ...] = shared.plugins()

    def check(self) -> None:
        """Refuse a template that leaves questions out.

        Raises:
            ConfigError: names it.
        """
        if self.template == "plain":
            raise ConfigError("--template plain shows the model the picture alone, and no question; use v1, or leave it out")
