"""Fields of official JSON files, with the type that they must have, or a message that says where it is not so."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alignkd.errors import DataError

_KINDS = {dict: "an object", list: "a list", type(None): "null", bool: "true or false"}


@dataclass(frozen=True)
class Entry:
    """A JSON object of an official file, and in words where it stands."""

    value: Mapping[str, Any]
    where: str

    def text(self, name: str) -> str:
        """A field that is a text.

        Raises:
            DataError: it is missing, or something else.
        """
        found = self.value.get(name)
        if not isinstance(found, str):
            raise self._refusal(name, "a text")
        return found

    def optional_text(self, name: str) -> str:
        """A field that is a text; empty where it is null or absent.

        Raises:
            DataError: it is something else.
        """
        return "" if self.value.get(name) is None else self.text(name)

    def whole(self, name: str) -> int:
        """A field that is a whole number.

        Raises:
            DataError: it is missing, or something else.
        """
        found = self.value.get(name)
        if not isinstance(found, int) or isinstance(found, bool):
            raise self._refusal(name, "a whole number")
        return found

    def flag(self, name: str) -> bool:
        """A field that is true or false.

        Raises:
            DataError: it is missing, or something else.
        """
        found = self.value.get(name)
        if not isinstance(found, bool):
            raise self._refusal(name, "true or false")
        return found

    def texts(self, name: str) -> tuple[str, ...]:
        """A field that is a list of texts.

        Raises:
            DataError: it is missing, or something else.
        """
        found = self.value.get(name)
        if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
            raise self._refusal(name, "a list of texts")
        return tuple(found)

    def entry(self, name: str) -> "Entry":
        """A field that is an object.

        Raises:
            DataError: it is missing, or something else.
        """
        found = self.value.get(name)
        if not isinstance(found, dict):
            raise self._refusal(name, "an object")
        return Entry(found, f"{self.where}, {name}")

    def entries(self, name: str) -> list["Entry"]:
        """A field that is a list of objects.

        Raises:
            DataError: it is missing, or something else.
        """
        found = self.value.get(name)
        if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
            raise self._refusal(name, "a list of objects")
        return [Entry(item, f"{self.where}, {name}, number {number}") for number, item in enumerate(found, start=1)]

    def _refusal(self, name: str, expected: str) -> DataError:
        found = described(self.value[name]) if name in self.value else "missing"
        return DataError(f"{self.where}: {name!r} is {found}, expected {expected}; download the official file again")


def entry_of(value: Any, where: str) -> Entry:
    """A value that must be an object.

    Raises:
        DataError: it is something else.
    """
    if not isinstance(value, dict):
        raise DataError(f"{where}: found {described(value)}, expected an object; download the official file again")
    return Entry(value, where)


def described(value: Any) -> str:
    """A JSON value in a few words; a text or a number as it stands."""
    return _KINDS.get(type(value)) or f"{value!r:.80}"
