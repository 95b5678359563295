"""The configuration of ``alignkd show``."""

from dataclasses import dataclass

from alignkd.pipeline.config import shared
from alignkd.pipeline.config.shared import DEFAULT_MAX_LENGTH
from alignkd.settings import setting


@dataclass(frozen=True, kw_only=True)
class ShowConfig(shared.DataSettings):
    """What ``alignkd show`` is asked to do."""

    model: str = setting(group="model", help="A checkpoint: a folder, or ORG/NAME[@REVISION].")
    id: str | None = setting(None, group="data", default_text="the first", help="Id of the sample.")
    template: str | None = shared.template()
    prompt_date: str | None = shared.prompt_date()
    max_length: int = setting(DEFAULT_MAX_LENGTH, group="data", at_least=2, help="Most token ids of a sample.")
    save: str | None = setting(None, group="storage", help="Write the arrays to an .npz file.")
    plot: str | None = setting(None, group="storage", help="Draw the attention over the image to a .png file.")
    dtype: str = shared.dtype("Dtype of the model.")
    device: str | None = shared.device()
    vision_tower: str | None = shared.vision_tower()
    download: bool = shared.download()
    plugins: tuple[str, ...] = shared.plugins()
