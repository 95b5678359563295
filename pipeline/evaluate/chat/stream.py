"""An answer's text while its tokens come: whole words, which later tokens cannot change."""

import unicodedata
from collections.abc import Callable
from typing import Any

from transformers.generation.streamers import BaseStreamer

_UNFINISHED = "\ufffd"
"""What decoders write for bytes that are no letter yet."""


class AnswerStreamer(BaseStreamer):  # type: ignore[misc]
    """Writes an answer piece by piece; together the pieces are the text of all ids, to the character.

    ``text_of``: the text of ids from the answer's first on, as :meth:`alignkd.models.vlm.Vlm.answer_text` gives it, so that a
    word is decoded in its place. transformers' own ``TextStreamer`` begins anew after each line break, where SentencePiece then
    loses a space.
    """

    def __init__(self, text_of: Callable[[list[int]], str], write: Callable[[str], None]) -> None:
        self.ids: list[int] = []
        self.written = ""
        self._text_of, self._write = text_of, write
        self._prompt_came = False

    def put(self, value: Any) -> None:
        """transformers' hook: first the prompt ``[1, S]``, then each new id ``[1]``."""
        if not self._prompt_came:
            self._prompt_came = True
            return
        self.ids += value.flatten().tolist()
        text = self.text
        self._emit(text[: settled(text)])

    def end(self) -> None:
        """Write what is left; transformers' hook, and to be called where generation was stopped."""
        self._emit(self.text)
        if self.written != self.text:  # a decoder that changed what it had written: the whole answer, on a line of its own
            self._write(f"\n{self.text}")
            self.written = self.text

    @property
    def text(self) -> str:
        """The text of all ids so far."""
        return self._text_of(self.ids)

    def _emit(self, text: str) -> None:
        if len(text) > len(self.written) and text.startswith(self.written):
            self._write(text[len(self.written) :])
            self.written = text


def settled(text: str) -> int:
    """How many characters of a growing text will stay: up to its last word, or to its last letter of a script without spaces.

    A letter whose bytes are still missing is not settled, and neither is white space, which would be stripped at the end.
    """
    length = len(text)
    while length and text[length - 1] == _UNFINISHED:
        length -= 1
    position = length
    while position and not text[position - 1].isspace():
        if unicodedata.east_asian_width(text[position - 1]) in ("W", "F"):
            return position
        position -= 1
    return len(text[:position].rstrip())
