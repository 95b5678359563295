"""The configuration of ``alignkd evaluate``."""

from dataclasses import dataclass

from alignkd.pipeline.config import shared
from alignkd.settings import setting


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(shared.DataSettings):
    """What ``alignkd evaluate`` is asked to do."""

    model: str = setting(group="model", help="A checkpoint: a folder, or ORG/NAME[@REVISION].")
    metric: str = setting(
        "exact", group="data", help="How answers are compared: exact, contains, or a metric that a plugin registers."
    )
    out: str | None = setting(None, group="storage", aliases=("output-dir",), help="Folder for predictions and result.")
    template: str | None = shared.template()
    prompt_date: str | None = shared.prompt_date()
    batch_size: int = setting(64, group="model", aliases=("bs",), at_least=1, help="Most questions at a time.")
    max_new_tokens: int = setting(32, group="model", at_least=1, help="Most tokens of an answer.")
    dtype: str = shared.dtype("Dtype of the model.")
    max_rejected: int | str = shared.max_rejected()
    device: str | None = shared.device()
    vision_tower: str | None = shared.vision_tower()
    download: bool = shared.download()
    plugins: tuple[str, ...] = shared.plugins()
