"""The configuration of ``alignkd check``."""

from dataclasses import dataclass

from alignkd.errors import ConfigError
from alignkd.pipeline.config import shared
from alignkd.settings import setting

_OF_THE_MODEL = ("template", "prompt_date", "max_length", "vision_tower")


@dataclass(frozen=True, kw_only=True)
class CheckConfig(shared.DataSettings):
    """What ``alignkd check`` is asked to do."""

    model: str | None = setting(
        None,
        group="model",
        help="A checkpoint, a folder or ORG/NAME[@REVISION]: judge samples as its own encoder does.",
    )
    read_images: bool = setting(True, group="data", help="Read every image; without, the texts alone are checked.")
    template: str | None = shared.template()
    prompt_date: str | None = shared.prompt_date()
    max_length: int | None = setting(
        None,
        group="data",
        at_least=2,
        default_text=f"{shared.DEFAULT_MAX_LENGTH}, with --model",
        help="Cut texts at this many ids, as cache-teacher does.",
    )
    vision_tower: str | None = shared.vision_tower()
    download: bool = shared.download()
    workers: int | None = setting(
        None, at_least=1, at_most=256, default_text="the processor cores", help="Processes that read samples and images."
    )
    first: int = setting(3, group="data", at_least=0, help="How many samples are named for each reason.")
    plugins: tuple[str, ...] = shared.plugins()

    def check(self) -> None:
        """Refuse settings of a model where none is given.

        Raises:
            ConfigError: names the setting.
        """
        super().check()
        given = [name for name in _OF_THE_MODEL if getattr(self, name) is not None]
        if self.model is None and given:
            raise ConfigError(f"--{given[0].replace('_', '-')} is about a model: give --model DIR, or leave it out")
