"""Settings that several jobs share."""

from dataclasses import dataclass
from typing import Any, Literal

from alignkd.errors import ConfigError
from alignkd.settings import Settings, setting

DEFAULT_MAX_LENGTH = 2048
ANSWERS = ("data", "teacher", "both")
Answers = Literal["data", "teacher", "both"]
DTYPES = ("float32", "bfloat16", "float16")
SHARD_FORMATS = ("zarr", "webdataset")
ATTENTION_CODECS = ("sqrt8", "sqrt4", "float16", "int8-rows", "exact")
VISION_CODECS = ("int8-rows", "int4-blocks", "float16", "exact")


def data() -> Any:
    """The data: a file, a folder or a URL, or several."""
    return setting(
        group="data",
        aliases=("data-path",),
        help="Samples in JSON, JSON lines, Parquet, a saved dataset or WebDataset shards; may be repeated. See docs/data.md.",
    )


def images() -> Any:
    """The folder of the images, or one for each of several data."""
    return setting(
        None,
        group="data",
        aliases=("image-folder", "image-dir"),
        help="Folder that image paths are relative to: one for all --data, or one each.",
    )


@dataclass(frozen=True, kw_only=True)
class DataSettings(Settings):
    """Which samples a job reads: what :func:`alignkd.pipeline.data.open_samples.open_samples` opens."""

    data: str | tuple[str, ...] = data()
    images: str | tuple[str, ...] | None = images()
    data_weight: tuple[float, ...] = setting(
        (),
        group="data",
        more_than=0,
        at_most=1000,
        default_text="1",
        help="How often an epoch of distill takes the samples of each --data (no other command weighs them): once for each"
        " --data, in their order.",
    )
    limit: int | None = setting(None, group="data", at_least=1, default_text="all", help="Read the first N samples alone.")
    sample: int | None = setting(
        None,
        group="data",
        at_least=1,
        default_text="all",
        help="Use N samples, chosen by a hash of their content: the same ones in every order and shape of the data.",
    )
    sample_seed: int = setting(0, group="data", at_least=0, at_most=2**32 - 1, help="Another seed chooses other --sample.")
    merge_turns: bool = setting(
        False, group="data", help="Join consecutive turns of one speaker with a line break; without it, the sample is rejected."
    )

    local_cache: str | None = setting(
        None,
        group="data",
        metavar="SIZE",
        default_text="50GB",
        help="Most disk for copies of data and images from URLs, and of what is unpacked.",
    )

    def check(self) -> None:
        """Refuse settings that contradict each other.

        Raises:
            ConfigError: as many image folders or weights as there are no data for.
        """
        data, images = several(self.data), several(self.images)
        if len(images) > 1 and len(images) != len(data):
            raise ConfigError(
                f"--images is given {len(images)} times and --data {len(data)} times: give one for all, or one each"
            )
        if self.data_weight and len(self.data_weight) != len(data):
            raise ConfigError(
                f"--data-weight is given {len(self.data_weight)} times and --data {len(data)} times: give one for each --data"
            )

    @property
    def data_words(self) -> str:
        """The data as a line of a log names it."""
        return ", ".join(several(self.data))

    @property
    def images_words(self) -> str | None:
        """The image folders as a line of a log names them."""
        return ", ".join(several(self.images)) or None


def several(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The values of a setting that may be given several times."""
    return () if value is None else (value,) if isinstance(value, str) else value


def template() -> Any:
    """The prompt template."""
    return setting(None, group="data", default_text="the model's", help="Prompt template.")


def prompt_date() -> Any:
    """The moment that a chat template with a date is given."""
    return setting(
        None,
        group="data",
        default_text="the cache's, else now",
        help="Date, such as 2024-07-26, for a chat template that writes one.",
    )


def dtype(words: str) -> Any:
    """A dtype, float32 by default."""
    return setting("float32", group="model", choices=DTYPES, help=words)


def seed(words: str) -> Any:
    """A seed that Python, numpy and torch all take."""
    return setting(0, at_least=0, at_most=2**32 - 1, help=words)


def device() -> Any:
    """Where models run."""
    return setting(None, group="model", default_text="the GPU where there is one", help="cpu, cuda, cuda:1 ...")


def vision_tower() -> Any:
    """Where the CLIP tower is, if the checkpoint does not hold it."""
    return setting(
        None, group="model", help="The CLIP tower, if the checkpoint names one that is not there: a folder, or ORG/NAME."
    )


def download() -> Any:
    """Whether models that are given by name may be fetched."""
    return setting(
        False, group="model", help="Fetch models given as ORG/NAME[@REVISION] that the local Hugging Face cache lacks."
    )


def max_rejected() -> Any:
    """How many samples may be rejected: a number, or a share of all samples."""
    return setting(
        "1%",
        group="data",
        at_least=0,
        or_share=True,
        metavar="N|P%",
        help="Stop when more samples than this cannot be used; a share allows 10 at least.",
    )


def plugins() -> Any:
    """Files with terms, metrics and families of the user's own."""
    return setting(
        (),
        flag="plugin",
        metavar="FILE.py",
        help="Python file that registers terms, metrics or model families; may be repeated.",
    )
