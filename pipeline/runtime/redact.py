"""Credentials never reach a file or a log: URLs lose user and query, and values that look or are named like secrets go.

What is removed is replaced by one word, so that a reader sees that something was there.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

REMOVED = "REDACTED"

_NAME = (
    r"(?:[\w.-]*(?:secret|password|passwd|passphrase|pwd|credentials?|authorization|signature|api[_-]?key|auth[_-]?key"
    r"|(?:secret|access|account|private|session|license)[_-]?key(?:[_-]?id)?)"
    r"|(?:(?!(?:[\w.-]*[_-])?(?:bos|eos|pad|unk|sep|cls|mask|image|video|special)[_-]?token)[\w.-]*)token"
    r"|(?:[\w.-]*[_-])?(?:sig|sas))"
)
"""Names of what is secret; ``max_new_tokens`` and ``pad_token`` are none."""

_SECRET_NAME = re.compile(rf"-*{_NAME}", re.IGNORECASE)
_ENVIRONMENT_NAME = re.compile(rf"{_NAME}|\w*_key", re.IGNORECASE)
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?P<rest>(?:\[[0-9A-Fa-f:.]*\]|(?!::)[^\s\"'<>])*)")
_PORT = re.compile(r"(?:\[[^\]]*\]|[^:]*)(?::\d*)?")
_HOST_END = re.compile(r"[/?#]")
_END_OF_SENTENCE = ".,;:)]}"
_ASSIGNED = re.compile(rf"(?P<name>(?<![\w.-])-{{0,2}}{_NAME}=)(?P<value>[^\s&;,\"']+|\"[^\"]*\"|'[^']*')", re.IGNORECASE)
_IN_JSON = re.compile(
    rf"(?P<name>(?P<quote>[\"']){_NAME}(?P=quote)\s*:\s*)(?P<mark>[\"'])(?:\\.|(?!(?P=mark)).)*(?P=mark)", re.I
)
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|(?:sk|rk|pk)-[A-Za-z0-9_-]{20,}"
    r"|(?:AKIA|ASIA|AROA|AIDA)[A-Z0-9]{12,}|AIza[\w-]{30,}|ya29\.[\w.-]{16,}|xox[abeoprs]-[\w-]{10,}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]+)?|(?:Bearer|Basic)\s+(?=\S*\d)[A-Za-z0-9+/=._~-]{12,}"
    r")"
)
_SHORTEST_SECRET = 8


def redacted(value: Any) -> Any:
    """A copy of a record without credentials: of dictionaries, lists and texts; anything else that JSON lacks is its text."""
    if isinstance(value, Mapping):
        return {redacted_text(str(name)): _of_name(str(name), item) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return _words(list(value))
    if value is None or isinstance(value, bool | int | float):
        return value
    return redacted_text(os.fspath(value) if isinstance(value, os.PathLike) else str(value))


def redacted_text(text: str) -> str:
    """A text without credentials.

    User and query of URLs, texts that have the form of a known kind of token, what is assigned to a secret's name, and the
    values of this process's environment variables that have such a name.
    """
    for secret in _secrets_of_environment():
        text = text.replace(secret, REMOVED)
    text = _URL.sub(lambda found: found["scheme"] + _without_user_and_query(found["rest"]), text)
    text = _ASSIGNED.sub(rf"\g<name>{REMOVED}", text)
    text = _IN_JSON.sub(rf"\g<name>\g<mark>{REMOVED}\g<mark>", text)
    return _TOKEN.sub(REMOVED, text)


def _of_name(name: str, value: Any) -> Any:
    if isinstance(value, str | list | tuple) and value and _SECRET_NAME.fullmatch(name):
        return REMOVED
    return redacted(value)


def _words(items: list[Any]) -> list[Any]:
    """A list, which may be a command line: the word after an option with a secret's name goes as well."""
    found, secret_next = [], False
    for item in items:
        is_option = isinstance(item, str) and item.startswith("-")
        found.append(REMOVED if secret_next and isinstance(item, str) and not is_option else redacted(item))
        secret_next = is_option and _SECRET_NAME.fullmatch(item) is not None
    return found


def _without_user_and_query(rest: str) -> str:
    body = rest.rstrip(_END_OF_SENTENCE)
    end = rest[len(body) :]
    while "@" in body and ("@" in (host := _HOST_END.split(body, maxsplit=1)[0]) or not _PORT.fullmatch(host)):
        body = body.partition("@")[2]  # a password may hold a slash or a question mark
    place, mark, query = body.partition("?")
    if not mark and "=" in body.partition("#")[2]:
        place, mark, query = body.partition("#")
    return place + (mark + REMOVED if query else mark) + end


def _secrets_of_environment() -> list[str]:
    found = {
        value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST_SECRET and not value.startswith("/") and _ENVIRONMENT_NAME.fullmatch(name)
    }
    return sorted(found, key=len, reverse=True)
