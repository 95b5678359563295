"""Which characters of a text each SentencePiece piece covers: pieces make up the text, except for spaces added or dropped.

Shapes: L pieces.
"""

from collections.abc import Callable, Sequence

import numpy as np

WORD_START = "\u2581"


class Piece(str):
    """A piece; ``kind``: ``text``, a ``byte`` of a character (``<0xE2>``), or ``unknown`` characters."""

    kind: str

    def __new__(cls, text: str, kind: str = "text") -> "Piece":
        """A piece of a kind."""
        piece = super().__new__(cls, text)
        piece.kind = kind
        return piece


def piece_offsets(pieces: Sequence[Piece], text: str, is_known: Callable[[str], bool]) -> np.ndarray:
    """First and last character (exclusive) of each piece, ``[L, 2]``; pieces that are bytes of one character all cover it.

    ``is_known``: whether a character is a piece; unknown pieces cover those that are not.

    Raises:
        ValueError: the pieces do not make up the text.
    """
    walk, found = _Walk(text, is_known), np.zeros((len(pieces), 2), dtype=np.int64)
    for number, piece in enumerate(pieces):
        found[number] = walk.take(piece)
    return found


class _Walk:
    """A position in a text, which each piece moves forward. ``part``: bytes of its character that pieces covered already."""

    def __init__(self, text: str, is_known: Callable[[str], bool]) -> None:
        self.text, self.is_known = text, is_known
        self.position, self.part = 0, 0

    def take(self, piece: Piece) -> tuple[int, int]:
        """The characters that the next piece covers."""
        if piece.kind == "byte":
            return self._byte(int(piece[3:5], 16))
        if piece.kind == "unknown":
            return self._unknown()
        start: int | None = None
        for character in piece:
            if character == WORD_START:
                self.position += self.position < len(self.text) and self.text[self.position] in (" ", WORD_START)
                continue
            self.position = self._after_spaces(character)
            start = self.position if start is None else start
            self._expect(self.text[self.position : self.position + 1] == character, piece)
            self.position += 1
        return self.position if start is None else start, self.position

    def _unknown(self) -> tuple[int, int]:
        start = self.position = self._after_spaces("")
        while self.position < len(self.text) and not self.is_known(self.text[self.position]):
            self.position += 1
        return start, self.position

    def _byte(self, value: int) -> tuple[int, int]:
        if not self.part:
            while self.position < len(self.text) and self.text[self.position].encode()[0] != value:
                self._expect(self.text[self.position].isspace(), f"<0x{value:02X}>")
                self.position += 1
        self._expect(self.position < len(self.text), f"<0x{value:02X}>")
        start, written = self.position, self.text[self.position].encode()
        self._expect(written[self.part] == value, f"<0x{value:02X}>")
        self.part += 1
        if self.part == len(written):
            self.position, self.part = self.position + 1, 0
        return start, start + 1

    def _after_spaces(self, character: str) -> int:
        """The next position with ``character``, or with anything but white space."""
        position = self.position
        while position < len(self.text) and self.text[position] != character and _is_space(self.text[position]):
            position += 1
        return position

    def _expect(self, holds: bool, piece: str) -> None:
        if not holds:
            raise ValueError(
                f"the tokenizer gives {str(piece)!r} where the text continues with {self.text[self.position :][:20]!r}"
            )


def _is_space(character: str) -> bool:
    return character.isspace() or character == WORD_START
