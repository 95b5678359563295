"""How a generated answer is compared with the expected one; plugins register further metrics."""

import unicodedata
from collections.abc import Callable, Mapping
from types import MappingProxyType

from alignkd.errors import ConfigError

Metric = Callable[[str, str], bool]
"""Takes the prediction and the expected answer; says whether the prediction is right."""


def exact(prediction: str, answer: str) -> bool:
    """The same words; case, surrounding white space and a final full stop do not count. Nothing equals an empty answer."""
    return not is_empty(answer) and _words(prediction) == _words(answer)


def contains(prediction: str, answer: str) -> bool:
    """The answer occurs in the prediction, in any case. An empty answer occurs nowhere."""
    return not is_empty(answer) and _words(answer) in prediction.casefold()


def is_empty(answer: str) -> bool:
    """Whether an expected answer holds nothing to compare with: white space, full stops and characters without a shape."""
    return all(c.isspace() or c == "." or unicodedata.category(c) in ("Cc", "Cf") for c in answer)


def _words(text: str) -> str:
    return text.strip().rstrip(".").casefold()


_METRICS: dict[str, Metric] = {"exact": exact, "contains": contains}
METRICS: Mapping[str, Metric] = MappingProxyType(_METRICS)
"""All metrics by name."""


def register_metric(name: str) -> Callable[[Metric], Metric]:
    """Decorator: make a function a metric of ``alignkd evaluate --metric NAME``.

    Raises:
        ConfigError: another metric has this name.
    """

    def register(metric: Metric) -> Metric:
        if name in _METRICS:
            raise ConfigError(f"a metric {name!r} is registered already; choose another name")
        _METRICS[name] = metric
        return metric

    return register


def get_metric(name: str) -> Metric:
    """A metric by its name.

    Raises:
        ConfigError: lists the known ones.
    """
    if name not in METRICS:
        raise ConfigError(f"--metric {name!r}: known are {', '.join(METRICS)}; a --plugin may register others")
    return METRICS[name]
