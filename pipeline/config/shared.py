"""Settings that several jobs share."""

from typing import Any

from alignkd.settings import setting

DEFAULT_MAX_LENGTH = 2048
DTYPES = ("float32", "bfloat16", "float16")
SHARD_FORMATS = ("zarr", "webdataset")
ATTENTION_CODECS = ("sqrt8", "sqrt4", "float16", "int8-rows", "exact")
VISION_CODECS = ("int8-rows", "int4-blocks", "float16", "exact")


def data() -> Any:
    """The data file."""
    return setting(group="data", aliases=("data-path",), help="LLaVA-format JSON or JSON lines.")


def images() -> Any:
    """The folder of the images."""
    return setting(None, group="data", aliases=("image-folder", "image-dir"), help="Folder that image paths are relative to.")


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
    return setting(None, group="model", help="Local folder of the CLIP tower, if the checkpoint names one that is not there.")


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
