"""The part of a cache's fingerprint that decides which students can be trained from it."""

from typing import Any

from alignkd.models.encoders.version import encoder_version
from alignkd.models.vlm import Vlm


def model_fingerprint(vlm: Vlm, template: str) -> dict[str, Any]:
    """A model's architecture, tokenizer, template and preprocessing, under the keys of a cache's fingerprint."""
    digest = vlm.template_fingerprint()
    encoder = encoder_version(vlm.family, template)
    return {
        "teacher": {
            "family": vlm.family,
            "vocabulary": vlm.vocabulary,
            "heads": vlm.heads,
            "width": vlm.hidden_size,
            "image_token_id": vlm.image_token_id,
            "tokens_per_placeholder": vlm.tokens_per_placeholder,
            **({"no_place": vlm.without_coordinates} if vlm.without_coordinates else {}),
        },
        "tokenizer": vlm.tokenizer_fingerprint(),
        "template": template,
        **({"chat_template": digest} if digest else {}),
        **({"encoder": encoder} if encoder > 1 else {}),
        "image_preprocessing": vlm.image_fingerprint(),
        "vision_tokens_per_image": vlm.vision_tokens_per_image,
    }
