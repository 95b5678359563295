"""How a generated answer is compared with the expected one; plugins register further metrics."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from alignkd.errors import ConfigError

Metric = Callable[[str, str], bool]
"""Takes the prediction and the expected answer; says whether the prediction is right."""


def exact(prediction: str, answer: str) -> bool:
    """The same words; case, surrounding white space and a final full stop do not count."""
    return prediction.strip().rstrip(".").casefold() == answer.strip().rstrip(".").casefold()


def contains(prediction: str, answer: str) -> bool:
    """The answer occurs in the prediction, in any case."""
    return answer.strip().rstrip(".").casefold() in prediction.casefold()


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
