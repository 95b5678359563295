"""What transformers alone makes of a conversation: the reference that families are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from checkpoints import TinyFamily
from conversations import Conversation
from transformers import AutoModelForImageTextToText

from alignkd.models.encoders.processors import load_processor

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def plain_model(folder: Path, attention: str = "sdpa") -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, attn_implementation=attention).eval()


def plain_inputs(
    folder: Path, model_type: str, family: TinyFamily, conversation: Conversation, *, opened: bool = False
) -> dict[str, Any]:
    """Ids, pixel values and all else, ``[1, S]``; ``opened``: up to where the last answer begins."""
    turns = conversation.turns[:-1] if opened else conversation.turns
    if family.plain is not None:
        return family.plain(folder, turns, conversation.images, opened)
    processor = load_processor(folder, model_type)
    return dict(
        processor.apply_chat_template(
            [_message(*turn, images, family) for turn, images in zip(turns, _share(turns, conversation.images), strict=True)],
            add_generation_prompt=opened,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    )


def _share(turns: Any, images: list[Any]) -> list[list[Any]]:
    """Images by turn."""
    left = list(images)
    return [[left.pop(0) for _ in range(text.count("<image>"))] for _, text in turns]


def _message(speaker: str, text: str, images: list[Any], family: TinyFamily) -> dict[str, Any]:
    content: list[dict[str, Any]] = []
    for position, part in enumerate(text.split("<image>")):
        if position:
            content.append({"type": "image", "image": images[position - 1]})
        if part:
            end = family.end if speaker == "gpt" and not family.template_ends else ""
            content.append({"type": "text", "text": part + end})
    return {"role": ROLES[speaker], "content": content}


def forward(model: Any, inputs: dict[str, Any], **settings: Any) -> Any:
    with torch.no_grad():
        output = model(**inputs, use_cache=False, **settings)
    return getattr(output, "language_model_outputs", output)
