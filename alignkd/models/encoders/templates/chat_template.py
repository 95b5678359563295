"""A checkpoint's chat template: messages to text, as transformers renders it, under one date."""

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import ext, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from alignkd.errors import ConfigError
from alignkd.inputs.prompts import PromptError
from alignkd.models.encoders.templates.measure import TemplateLimitError
from alignkd.models.encoders.templates.sandbox import GenerationBlocks, LimitedEnvironment, render

Message = dict[str, Any]
_CLOCK = "strftime_now"


def check_date(date: str) -> str:
    """A moment in the form that fingerprints and options have.

    Raises:
        ConfigError: it is none.
    """
    try:
        return datetime.fromisoformat(date).isoformat(timespec="seconds")
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{date!r} is no date: expected one such as 2024-07-26 or 2024-07-26T12:00:00") from error


class ChatTemplate:
    """``source`` with the special tokens that it may name; ``date``: the moment that its clock shows, in ISO 8601."""

    def __init__(self, source: str, special_tokens: Mapping[str, Any], date: str = "") -> None:
        self.source = source
        self.date = date or datetime.now().isoformat(timespec="seconds")
        self._variables = {name: _plain(value) for name, value in special_tokens.items()}

    @property
    def uses_date(self) -> bool:
        """Whether its text may change with the clock."""
        return _CLOCK in self.source

    @property
    def has_generation_blocks(self) -> bool:
        """Whether it says itself what an assistant generates."""
        return bool(re.search(r"\{%[-+]?\s*generation\b", self.source))

    @cached_property
    def _compiled(self) -> Any:
        # Its clock reads the date at each call.
        return LimitedEnvironment(lambda form: datetime.fromisoformat(self.date).strftime(form)).from_string(self.source)

    def render(self, messages: Sequence[Message], *, opened: bool = False, marked: bool = False) -> str:
        """The text of a conversation; ``opened``: followed by the beginning of an answer.

        ``marked``: with :data:`sandbox.OPEN` and :data:`sandbox.CLOSE` around what it says an assistant generated.

        Raises:
            PromptError: the template rejects the conversation, or reaches a limit.
        """
        given = sum(map(_length, messages))
        variables = {**self._variables, "messages": messages, "tools": None, "documents": None, "add_generation_prompt": opened}
        try:
            return render(self._compiled, variables, given=given, marked=marked)
        except TemplateLimitError as error:
            raise PromptError(f"the chat template is stopped: {error}") from error
        except MemoryError:
            raise
        except Exception as error:  # a template may raise any error
            raise PromptError(f"the chat template rejects it: {str(error)[:200]}") from error

    @cached_property
    def literals(self) -> tuple[str, ...]:
        """The texts that its code compares with, splits at or writes; words of them too. The longest first."""
        constants = [node.value for node in self._tree.find_all(nodes.Const) if isinstance(node.value, str)]
        return _longest_first(part for text in constants for part in (text, text.strip(), *text.split()))

    @cached_property
    def read(self) -> tuple[str, ...]:
        """The texts that its code looks for in what it is given: to compare, to split, to strip."""
        looking = [*self._tree.find_all(nodes.Compare), *self._tree.find_all(nodes.Call)]
        found = (c.value for node in looking for c in node.find_all(nodes.Const) if isinstance(c.value, str))
        return _longest_first(part for text in found for part in (text.strip(), *text.split()))

    @cached_property
    def _tree(self) -> nodes.Template:
        return ImmutableSandboxedEnvironment(extensions=[GenerationBlocks, ext.loopcontrols]).parse(self.source)


def _length(message: Message) -> int:
    """Characters of a message's texts."""
    content = message["content"]
    return len(content) if isinstance(content, str) else sum(len(part.get("text", "")) for part in content)


def _longest_first(texts: Iterator[str]) -> tuple[str, ...]:
    return tuple(sorted({text for text in texts if text}, key=len, reverse=True))


def _plain(value: Any) -> Any:
    """A special token as text: a template is given nothing with methods of its own."""
    return [str(one) for one in value] if isinstance(value, list | tuple) else str(value)
