"""Conversations through a chat template, with what is supervised of them.

Shapes: C characters of the rendered text, O of the conversation's own texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from alignkd.inputs.prompts import PromptError, Turns
from alignkd.inputs.spans import counted
from alignkd.models.encoders.rendered import Range, Rendered, Turn, contents
from alignkd.models.encoders.templates.answers import answer_range
from alignkd.models.encoders.templates.chat_template import ChatTemplate, Message
from alignkd.models.encoders.templates.system_turns import check_shown
from alignkd.models.encoders.templates.tracing import Traced, trace

_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_PROBE: Turns = (("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d"))


@dataclass(frozen=True)
class Ending:
    """How an answer's turn ends: ``written`` by the template, or ``added`` to the answer's text where it writes nothing."""

    written: str
    added: str


@dataclass
class TemplatePrompts:
    """Renders conversations. ``endings``: of an answer that others follow, and of the last one."""

    template: ChatTemplate
    special_tokens: Sequence[str]
    """What a template may end a turn with, the longest first."""
    end_token: str
    endings: tuple[Ending, Ending] = (Ending("", ""), Ending("", ""))

    def __post_init__(self) -> None:
        self.endings = self._learn_endings()

    def render(self, conversation: list[Turn], *, opened: bool = False) -> str:
        """The text alone; ``opened``: followed by the beginning of an answer.

        Raises:
            PromptError: the template rejects it, or leaves out a system turn.
        """
        one = self._conversation(conversation, opened=opened)
        if one.has_system:
            self._check_system(trace(self.template, one.messages, one.texts), one)
        return self.template.render(one.messages(one.texts), opened=opened)

    def render_answers(self, conversation: list[Turn]) -> Rendered:
        """The text, with what is supervised and what it shows of the conversation.

        Raises:
            PromptError: the template rejects it, leaves out a system turn, or what it makes of an answer cannot be told.
        """
        one = self._conversation(conversation)
        found = trace(self.template, one.messages, one.texts)
        self._check_system(found, one)
        supervised = []
        for index, turn in enumerate(one.owners):
            if one.speakers[turn] == "gpt":
                ending = self.endings[turn == len(conversation) - 1]
                supervised += _supervised(found, index, turn, ending)
        return Rendered(found.text, supervised, _counts(found, one.added))

    def own_text(self) -> str:
        """What the template itself writes for a conversation of two turns: the text up to the question's, and after it."""
        one = self._conversation([Turn("human", ["a"]), Turn("gpt", ["b"])])
        found = trace(self.template, one.messages, one.texts)
        return "".join(character for character, source in zip(found.text, found.sources_C, strict=True) if source < 0)

    def _conversation(self, conversation: list[Turn], *, opened: bool = False) -> "_Conversation":
        one = _Conversation.of(conversation, self.endings, opened=opened)
        return replace(one, system_as_text=self._system_as_text) if one.has_system else one

    def _check_system(self, found: Traced, one: "_Conversation") -> None:
        for index, turn in enumerate(one.owners):
            if one.speakers[turn] == "system":
                check_shown(found, index, turn)

    @cached_property
    def _system_as_text(self) -> bool:
        """Whether the template takes a system turn's content as one text, and not as typed parts.

        Raises:
            PromptError: it takes neither; says why.
        """
        probe = contents((("system", "s"), *_PROBE[:2]), 0, lambda _: None)
        refused = list[str]()
        for as_text in (False, True):
            one = replace(_Conversation.of(probe, self.endings), system_as_text=as_text)
            try:
                self._check_system(trace(self.template, one.messages, one.texts), one)
            except PromptError as error:
                refused.append(str(error))
            else:
                return as_text
        raise PromptError(
            f"the model's chat template has no place for a system turn ({refused[0]}): use a template that has one, or take the"
            " turn out of the data"
        )

    def _learn_endings(self) -> tuple[Ending, Ending]:
        two = self._probe(2)
        tail = two.text[answer_range(two, 1, 1)[1] :]
        try:
            four = self._probe(4)
        except PromptError:  # a template for one question and one answer
            four, middle = two, tail
        else:
            rest = four.text[answer_range(four, 1, 1)[1] : int(np.flatnonzero(four.sources_C == four.firsts[2])[0])]
            # What belongs to the answer's own turn is there without the next turn, too; its end token may come with that one.
            middle = rest if rest.lstrip().startswith(self.end_token) else _shared(rest, tail)
        written = [part[: self._end_of_turn(part)] for part in (middle, tail)]
        before, last = (Ending(text, "" if text else self.end_token) for text in written)
        return before, last

    def _probe(self, turns: int) -> Traced:
        one = self._conversation(contents(_PROBE[:turns], 0, lambda _: None))
        return trace(self.template, one.messages, one.texts)

    def _end_of_turn(self, rest: str) -> int:
        """How many characters end a turn: its end token and special tokens directly before it, or else one special token."""
        space = len(rest) - len(rest.lstrip())
        tokens: list[str] = []
        while found := next((t for t in self.special_tokens if rest.startswith(t, space + sum(map(len, tokens)))), ""):
            tokens.append(found)
            if found == self.end_token:
                return space + sum(map(len, tokens))
        return space + len(tokens[0]) if tokens else 0


@dataclass(frozen=True)
class _Conversation:
    """A conversation's texts, with ``added`` characters at the end of each that are not its own, and the turn of each."""

    speakers: list[str]
    shape: list[list[int | None]]
    texts: list[str]
    added: list[int]
    owners: list[int]
    system_as_text: bool = False

    @classmethod
    def of(cls, conversation: list[Turn], endings: tuple[Ending, Ending], *, opened: bool = False) -> "_Conversation":
        shape, texts, added, owners = list[list[int | None]](), list[str](), list[int](), list[int]()
        for turn, (speaker, content) in enumerate(conversation):
            ending = endings[turn == len(conversation) - 1 and not opened].added if speaker == "gpt" else ""
            shape.append([])
            for part in content:
                shape[-1].append(None if part is None else len(texts))
                if part is not None:
                    texts.append(part + ending)
                    added.append(len(ending))
                    owners.append(turn)
        return cls([turn.speaker for turn in conversation], shape, texts, added, owners)

    @property
    def has_system(self) -> bool:
        """Whether it has a system turn."""
        return "system" in self.speakers

    def messages(self, texts: Sequence[str]) -> list[Message]:
        """Messages of typed parts, without empty texts."""
        return [
            {"role": _ROLES[speaker], "content": self._content(speaker, parts, texts)}
            for speaker, parts in zip(self.speakers, self.shape, strict=True)
        ]

    def _content(self, speaker: str, parts: list[int | None], texts: Sequence[str]) -> str | list[dict[str, str]]:
        if speaker == "system" and self.system_as_text:
            return "".join(texts[index] for index in parts if index is not None)
        return [
            {"type": "image"} if index is None else {"type": "text", "text": texts[index]}
            for index in parts
            if index is None or texts[index]
        ]


def _shared(one: str, other: str) -> str:
    """What both begin with."""
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]


def _supervised(found: Traced, index: int, turn: int, ending: Ending) -> list[Range]:
    """The ranges of one answer and what ends its turn, without what the template says is not generated."""
    start, end = answer_range(found, index, turn)
    after = end + len(ending.written)
    if not found.text.startswith(ending.written, end):
        raise PromptError(
            f"the chat template ends turn {turn} with {found.text[end : end + 30]!r}, but other answers with {ending.written!r}"
        )
    generated_C = found.generated_C
    if generated_C is None:
        return [(start, after)]
    places = np.flatnonzero(generated_C[start:end]) + start
    if not len(places) and (start < end or not generated_C[end:after].any()):
        return []
    return [*((place, place + 1) for place in places.tolist()), (end, after)]


def _counts(found: Traced, added: Sequence[int]) -> np.ndarray:
    """See :attr:`Rendered.counts_C2`."""
    flags = [counted(text) & (np.arange(len(text)) < len(text) - more) for text, more in zip(found.texts, added, strict=True)]
    before_O = np.concatenate([[0], np.concatenate(flags or [np.zeros(0, bool)]).cumsum()])
    sources_C, is_own = found.sources_C, found.sources_C >= 0
    # What the template writes stands for no characters, after those before it: these need not be the furthest of the
    # conversation, as a template may move a text (a system turn into the last question).
    last = np.maximum.accumulate(np.where(is_own, np.arange(len(sources_C)), -1))
    ends = np.concatenate([[0], np.where(last >= 0, before_O[sources_C[last] + 1], 0)])
    starts = ends.copy()
    starts[:-1][is_own] = before_O[sources_C[is_own]]
    return np.stack([starts, ends], axis=1)
