"""Llama's tokenizer on the SentencePiece library, with the splitting that the MobileVLM checkpoints were trained with.

transformers 5 converts ``tokenizer.model`` to the `tokenizers` library, which differs where a text begins with a space.
One id too many or too few shifts every label after it, so the original library is used.

Shapes: L ids.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from transformers.tokenization_utils_sentencepiece import SPIECE_UNDERLINE, SentencePieceBackend

from alignkd.models.encoders.piece_offsets import Piece, piece_offsets


class LlamaSentencePieceTokenizer(SentencePieceBackend):  # type: ignore[misc]
    """SentencePiece Llama tokenizer; ``legacy`` keeps the word-start piece after a special token (``</s>USER``).

    Follows ``LlamaTokenizer`` of transformers 4.33, the version of the official training code.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(
        self,
        vocab_file: str,
        unk_token: str = "<unk>",
        bos_token: str = "<s>",
        eos_token: str = "</s>",
        pad_token: str | None = None,
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        legacy: bool | None = None,
        **kwargs: Any,
    ) -> None:
        self.add_bos_token, self.add_eos_token = add_bos_token, add_eos_token
        super().__init__(
            vocab_file=vocab_file,
            unk_token=unk_token,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            add_bos_token=add_bos_token,
            add_eos_token=add_eos_token,
            legacy=True if legacy is None else legacy,
            **kwargs,
        )
        # Prompts repeat the same system text and the same pieces, which would be split again for every sample.
        self._remember()

    def _remember(self) -> None:
        self.encode_chunk = lru_cache(maxsize=65_536)(self._encode_chunk)
        self.chunk_offsets = lru_cache(maxsize=4096)(self._chunk_offsets)
        self._piece = lru_cache(maxsize=None)(self._make_piece)

    def _encode_chunk(self, text: str) -> tuple[int, ...]:
        return tuple(self(text).input_ids)

    def _chunk_offsets(self, text: str) -> np.ndarray:
        """First and last character (exclusive) of each id of ``encode_chunk(text)``, ``[L, 2]``; none of the start token.

        Raises:
            ValueError: the pieces do not make up the text.
        """
        added = self.build_inputs_with_special_tokens([])
        starts = int(self.add_bos_token)
        ids = self.encode_chunk(text)
        pieces = [self._piece(i) for i in ids[starts : len(ids) - (len(added) - starts)]]
        unknown = self.sp_model.unk_id()
        offsets = piece_offsets(pieces, text, lambda character: self.sp_model.piece_to_id(character) != unknown)
        end = np.full((len(added) - starts, 2), len(text), dtype=np.int64)
        return np.concatenate([np.zeros((starts, 2), dtype=np.int64), offsets, end])

    def _make_piece(self, token: int) -> Piece:
        text = str(self.convert_ids_to_tokens(token))
        if token >= self.sp_model.get_piece_size():
            return Piece(text)
        is_byte, is_unknown = self.sp_model.is_byte(token), self.sp_model.is_unknown(token)
        return Piece(text, "byte" if is_byte else "unknown" if is_unknown else "text")

    def __getstate__(self) -> dict[str, Any]:
        """Without the caches, and with the SentencePiece model as bytes."""
        state = self.__dict__.copy()
        for cached in ("encode_chunk", "chunk_offsets", "_piece"):
            del state[cached]
        state["sp_model"] = self.sp_model.serialized_model_proto()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        from sentencepiece import SentencePieceProcessor

        self.__dict__ = state
        self.sp_model = SentencePieceProcessor(model_proto=state["sp_model"])
        self._remember()

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """Split text into pieces."""
        if self.legacy or not text:
            return super().tokenize(text, **kwargs)  # type: ignore[no-any-return]
        tokens: list[str] = super().tokenize(SPIECE_UNDERLINE + text.replace(SPIECE_UNDERLINE, " "), **kwargs)
        if len(tokens) > 1 and tokens[0] == SPIECE_UNDERLINE and tokens[1] in self.all_special_tokens:
            return tokens[1:]
        return tokens

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: list[int] | None = None) -> list[int]:
        """Add the start (and, where configured, the end) token."""
        bos = [self.bos_token_id] if self.add_bos_token else []
        eos = [self.eos_token_id] if self.add_eos_token else []
        ids = bos + token_ids_0 + eos
        return ids if token_ids_1 is None else ids + bos + token_ids_1 + eos

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join pieces to text; byte pieces become their characters."""
        special = set(self.all_special_tokens)
        parts: list[str] = []
        pieces: list[str] = []
        for token in [*tokens, None]:
            if token is None or token in special:
                parts += [self.sp_model.decode_pieces(pieces), token or ""]
                pieces = []
            else:
                pieces.append(token)
        return "".join(parts)
