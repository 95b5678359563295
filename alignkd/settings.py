"""Settings declared once: a dataclass field with its default, its range and its help text.

The dataclass checks itself when it is made, and the command line reads the same declarations
(:mod:`alignkd.pipeline.commands.options.from_config`). Needs no torch.
"""

import dataclasses
import math
import operator
import os
import re
import types
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from alignkd.errors import ConfigError

_KEY = "alignkd"

GROUPS = ("data", "model", "targets", "training", "evaluation", "storage", "many machines", "advanced", "general")
"""The sections of a command's help, in this order."""


@dataclass(frozen=True)
class Setting:
    """What is declared of a field besides its type and default.

    ``flag``: the name of the option, if it is not the name of the field. ``choices``: the values allowed.
    ``default_text``: what help shows if the default is None. ``plain_flag``: ``--name`` without
    ``--no-name``. ``comma_separated``: a tuple given as one word. ``nested``: the field is a dataclass of settings, whose
    fields are options themselves. ``group``: the section of the help that shows it, one of :data:`GROUPS`. ``aliases``: other
    names of the option that users of similar tools type, without their dashes. ``or_share``: a text such as ``1%`` is allowed
    beside a number.
    """

    help: str = ""
    at_least: float | None = None
    more_than: float | None = None
    at_most: float | None = None
    less_than: float | None = None
    choices: tuple[Any, ...] = ()
    flag: str = ""
    metavar: str | None = None
    default_text: str = ""
    plain_flag: bool = False
    comma_separated: bool = False
    nested: bool = False
    group: str = "advanced"
    aliases: tuple[str, ...] = ()
    or_share: bool = False

    def __post_init__(self) -> None:
        assert self.group in GROUPS, self.group

    def refusal(self, value: Any) -> str:
        """What was expected instead of a value; empty where it is allowed."""
        if self.choices and value not in self.choices:
            return f"one of {', '.join(map(str, self.choices))}"
        if self.or_share and isinstance(value, str):
            return "" if is_share(value) else "a whole number of 0 or more, or a share from 0% to 100%"
        if isinstance(value, float) and not math.isfinite(value):
            return "a finite number"
        limits = [
            (self.at_least, "{} or more", operator.ge),
            (self.more_than, "more than {}", operator.gt),
            (self.at_most, "{} or less", operator.le),
            (self.less_than, "less than {}", operator.lt),
        ]
        missed = [words.format(limit) for limit, words, holds in limits if limit is not None and not holds(value, limit)]
        return " and ".join(missed)


def is_share(text: str) -> bool:
    """Whether a text is a share in per cent, such as ``1%`` or ``0.5%``."""
    return re.fullmatch(r"\d{1,3}(\.\d{1,9})?%", text, re.ASCII) is not None and float(text[:-1]) <= 100


def setting(default: Any = dataclasses.MISSING, /, *, factory: Any = dataclasses.MISSING, **declared: Any) -> Any:
    """A dataclass field that is a setting; ``declared``: the fields of :class:`Setting`. Without a default it is required."""
    return dataclasses.field(default=default, default_factory=factory, metadata={_KEY: Setting(**declared)})


def setting_of(field: dataclasses.Field[Any]) -> Setting | None:
    """What was declared of a field; None for a field that is no setting."""
    return field.metadata.get(_KEY)


def flag_of(field: dataclasses.Field[Any]) -> str:
    """The name of a setting on the command line, with its dashes."""
    declared = setting_of(field)
    name = (declared.flag if declared else "") or field.name.replace("_", "-")
    return f"--{name}"


def types_of(config: type[Any]) -> dict[str, tuple[type, ...]]:
    """The types that each field takes, without None: ``{"epochs": (float,), "report_to": (tuple,)}``."""
    return {name: _plain_types(hint) for name, hint in get_type_hints(config).items()}


def element_type(config: type[Any], name: str) -> type:
    """The type of each value of a field that takes several: ``float`` of ``tuple[float, ...]``."""
    hint = get_type_hints(config)[name]
    arms = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    found: type = next((get_args(arm)[0] for arm in arms if get_origin(arm) is tuple), str)
    return found


def _plain_types(hint: Any) -> tuple[type, ...]:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return tuple(plain for arm in get_args(hint) if arm is not type(None) for plain in _plain_types(arm))
    if origin is Literal:
        return tuple({type(value) for value in get_args(hint)})
    return (origin or hint,)


@dataclass(frozen=True)
class Settings:
    """A frozen dataclass of settings that refuses values of a wrong type or out of range when it is made.

    Raises:
        ConfigError: names the setting, the value and what was expected.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if (declared := setting_of(field)) is not None and not declared.nested:
                self._check_field(field, declared)
        self.check()

    def check(self) -> None:
        """Refuse settings that contradict each other; a subclass may say which.

        Raises:
            ConfigError: names them.
        """

    def _check_field(self, field: dataclasses.Field[Any], declared: Setting) -> None:
        value, accepted = getattr(self, field.name), types_of(type(self))[field.name]
        if isinstance(value, list | tuple) and tuple in accepted:
            value = tuple(os.fspath(one) if isinstance(one, os.PathLike) else one for one in value)
            # What may be given once or several times: one value is that value, so that one way to say it has one record.
            if str in accepted:
                value = value[0] if len(value) == 1 else value or field.default
            object.__setattr__(self, field.name, value)
        if value is None and field.default is None:
            return
        if value is dataclasses.MISSING:
            raise ConfigError(f"{flag_of(field)} is empty: expected one value or more")
        if isinstance(value, os.PathLike) and str in accepted:
            value = os.fspath(value)
            object.__setattr__(self, field.name, value)
        if not _is_of(value, accepted) or not _elements_are(value, element_type(type(self), field.name)):
            names = " or ".join(kind.__name__ for kind in accepted)
            raise ConfigError(f"{flag_of(field)} is {value!r}: expected {names}")
        for one in value if isinstance(value, tuple) else (value,):
            if expected := declared.refusal(one):
                raise ConfigError(f"{flag_of(field)} is {one!r}: expected {expected}")


def _elements_are(value: Any, kind: type) -> bool:
    return not isinstance(value, tuple) or all(_is_of(one, (kind,)) for one in value)


def _is_of(value: Any, accepted: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool in accepted
    return isinstance(value, accepted) or (float in accepted and isinstance(value, int))
