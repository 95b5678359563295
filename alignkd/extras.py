"""Packages that are needed by an option alone: their absence is said in one line, before work starts."""

import importlib.util

from alignkd.errors import ConfigError

_EXTRAS = {
    **{
        "pyarrow": "data",
        "datasets": "data",
        "s3fs": "s3",
        "gcsfs": "gcs",
        "ray": "ray",
        "deepspeed": "deepspeed",
        "peft": "lora",
        "num2words": "smolvlm",
    },
    **{"easy_vqa": "demo", "wandb": "wandb", "bitsandbytes": "quantized"},
}
"""The extra that installs a package. Others are installed with alignkd, or by their own name."""

_PIP_NAMES = {"comet_ml": "comet-ml", "azureml": "azureml-core", "clearml": "clearml", "dagshub": "dagshub"}


def require(package: str, needed_by: str) -> None:
    """Refuse an option whose package is not installed. ``package``: its import name. Nothing is imported.

    Raises:
        ConfigError: names the package, what needs it, and the command that installs it.
    """
    if importlib.util.find_spec(package) is None:
        raise ConfigError(missing(package, needed_by))


def missing(package: str, needed_by: str) -> str:
    """The message for a package that is not installed."""
    extra = _EXTRAS.get(package)
    name = f"'alignkd[{extra}]'" if extra else _PIP_NAMES.get(package, package)
    return f"{needed_by} needs the package {package}, which is not installed here; install it with: pip install {name}"
