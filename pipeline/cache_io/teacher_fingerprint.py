"""The part of a cache's fingerprint that decides which students can be trained from it."""

from typing import Any

from alignkd.models.vlm import Vlm


def describe_teacher(teacher: Vlm, template: str) -> dict[str, Any]:
    """A model's architecture, tokenizer, template and preprocessing, under the keys of a cache's fingerprint."""
    digest = teacher.template_fingerprint()
    return {
        "teacher": {
            "family": teacher.family,
            "vocabulary": teacher.vocabulary,
            "heads": teacher.heads,
            "width": teacher.hidden_size,
            "image_token_id": teacher.image_token_id,
            "tokens_per_placeholder": teacher.tokens_per_placeholder,
            **({"no_place": teacher.without_coordinates} if teacher.without_coordinates else {}),
        },
        "tokenizer": teacher.tokenizer_fingerprint(),
        "template": template,
        **({"chat_template": digest} if digest else {}),
        "image_preprocessing": teacher.image_fingerprint(),
        "vision_tokens_per_image": teacher.vision_tokens_per_image,
    }
