"""The turns and image references of a record, whatever its shape: LLaVA, messages, or ShareGPT.

* ``{"conversations": [{"from", "value"}]}``, of speakers ``human`` or ``user``, ``gpt`` or ``assistant``, and ``system``;
* ``{"messages": [{"role", "content"}]}``, of roles ``user``, ``assistant`` and ``system``. A content is a text, or a list of
  ``{"type": "text", "text"}`` and ``{"type": "image"}`` as chat templates of transformers take it. An image of such a list is
  an ``<image>`` in the text, with a line break between it and what is beside it if no white space is there: what LLaVA's
  records write.

Images are listed in ``image`` or ``images``, or named where they stand: ``{"type": "image", "path": ...}``.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from alignkd.errors import SampleError
from alignkd.inputs.prompts import IMAGE_TAG

Turns = list[tuple[str, str]]

SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
_ROLES = ("system", "user", "assistant")
_NAMES = ("path", "image", "url")
_MOST_ITEMS = 100_000


def read_turns(record: Mapping[str, Any]) -> tuple[Turns, list[str]]:
    """The turns of a record as ``(speaker, text)``, and the references of images that its contents name themselves.

    Raises:
        SampleError: there is no conversation, or a turn is none.
    """
    if "conversations" not in record and "messages" in record:
        return _messages(record["messages"])
    conversations = record.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        raise SampleError(f"'conversations' is {short(conversations)}, expected a list of turns")
    turns = []
    for turn in conversations:
        speaker = turn.get("from") if isinstance(turn, dict) else None
        if not isinstance(speaker, str) or speaker not in SPEAKERS or not isinstance(turn.get("value"), str):
            raise SampleError(f"turn {short(turn)}, expected {{'from': 'human', 'gpt' or 'system', 'value': text}}")
        turns.append((SPEAKERS[speaker], turn["value"]))
    return turns, []


def merged(turns: Sequence[tuple[str, str]]) -> Turns:
    """Turns with consecutive ones of one speaker joined by a line break."""
    found: Turns = []
    for speaker, text in turns:
        if found and found[-1][0] == speaker:
            found[-1] = speaker, f"{found[-1][1]}\n{text}"
        else:
            found.append((speaker, text))
    return found


def has_images(record: Mapping[str, Any]) -> bool:
    """Whether a record has a field for its images, which may be empty."""
    return "image" in record or record.get("images") is not None


def references(record: Mapping[str, Any]) -> list[str]:
    """The references of the images that a record lists: paths; in ``images``, ``{"path": ...}``, too.

    Raises:
        SampleError: it lists something else.
    """
    name = "image" if "image" in record else "images"
    listed = record.get(name)
    images = [] if listed in (None, "", []) else listed if isinstance(listed, list) else [listed]
    found = list[str]()
    for image in images:
        path = image.get("path") if isinstance(image, dict) and name == "images" else image
        if not isinstance(path, str) or not path:
            raise SampleError(f"{name!r} is {short(listed)}, expected a path or a list of paths")
        found.append(path)
    return found


def _messages(messages: Any) -> tuple[Turns, list[str]]:
    if not isinstance(messages, list) or not messages:
        raise SampleError(f"'messages' is {short(messages)}, expected a list of messages")
    turns, named = [], list[str]()
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        if role not in _ROLES:
            raise SampleError(f"message {short(message)}, expected {{'role': 'system', 'user' or 'assistant', 'content'}}")
        content = message.get("content")
        if isinstance(content, list) and len(content) <= _MOST_ITEMS:
            content = "".join(_texts(content, named))
        if not isinstance(content, str):
            raise SampleError(f"the content of message {short(message)} is no text and no list of texts and images")
        turns.append((SPEAKERS[role], content))
    return turns, named


def _texts(items: list[Any], named: list[str]) -> Iterator[str]:
    """The parts of a content as text; references of its images are added to ``named``."""
    last = ""
    for item in items:
        kind = item.get("type") if isinstance(item, dict) else None
        if kind == "text" and isinstance(item.get("text"), str):
            text = item["text"]
        elif kind in ("image", "image_url"):
            text = IMAGE_TAG
            if (name := _named(item)) is not None:
                named.append(name)
        else:
            raise SampleError(f"content {short(item)}, expected {{'type': 'text', 'text'}} or {{'type': 'image'}}")
        beside = bool(last and text) and IMAGE_TAG in (last, text) and not (last[-1].isspace() or text[0].isspace())
        yield "\n" + text if beside else text
        last = text or last


def _named(item: Mapping[str, Any]) -> str | None:
    """The reference that an image names itself; None where it is one of the record's list."""
    found = next((item[name] for name in _NAMES if item.get(name) is not None), item.get("image_url"))
    found = found.get("url") if isinstance(found, dict) else found
    if found is not None and not (isinstance(found, str) and found):
        raise SampleError(f"content {short(item)}: an image is named by its path")
    return found


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    kinds = {dict: "an object", list: "a list", str: "a text", type(None): "null", bool: "true or false"}
    return kinds.get(type(value), "a number")


def short(value: Any) -> str:
    """A value as text of at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
