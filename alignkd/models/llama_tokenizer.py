"""Llama's tokenizer on SentencePiece itself, with the splitting that the MobileVLM checkpoints were trained with.

transformers 5 converts ``tokenizer.model`` to the `tokenizers` library, which differs where a text begins with a space.
One id too many or too few shifts every label after it, so the original library does the work.
"""

from functools import lru_cache
from typing import Any

from transformers.tokenization_utils_sentencepiece import SPIECE_UNDERLINE, SentencePieceBackend


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
        # Prompts repeat the same system text and the same pieces: every sample is otherwise split anew many times.
        self.encode_chunk = lru_cache(maxsize=65_536)(self._encode_chunk)

    def _encode_chunk(self, text: str) -> tuple[int, ...]:
        return tuple(self(text).input_ids)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the cache behind and carry the SentencePiece model by its bytes."""
        state = self.__dict__.copy()
        del state["encode_chunk"]
        state["sp_model"] = self.sp_model.serialized_model_proto()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        from sentencepiece import SentencePieceProcessor

        self.__dict__ = state
        self.sp_model = SentencePieceProcessor(model_proto=state["sp_model"])
        self.encode_chunk = lru_cache(maxsize=65_536)(self._encode_chunk)

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
        """Join pieces to text; byte pieces become the characters they spell."""
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
