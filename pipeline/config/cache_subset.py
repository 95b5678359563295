"""The samples that ``alignkd cache subset`` keeps."""

from dataclasses import dataclass

from alignkd.pipeline.config import shared
from alignkd.settings import setting


@dataclass(frozen=True, kw_only=True)
class CacheSubsetConfig(shared.DataSettings):
    """The data whose samples are kept; without any, ids or keys say which, or all are."""

    data: str | tuple[str, ...] = setting(
        (), group="data", aliases=("data-path",), default_text="all samples", help="Keep the samples of these data."
    )
