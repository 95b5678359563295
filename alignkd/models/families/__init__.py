"""The families: one file each, by the ``model_type`` of its configuration."""

from importlib import import_module

from alignkd.models.transformers_vlm import TransformersVlm

FAMILIES = {
    "llava": "llava:Llava",
    "llava_next": "llava_next:LlavaNext",
    "llava_onevision": "llava_onevision:LlavaOnevision",
    "qwen2_5_vl": "qwen2_5_vl:Qwen25Vl",
    "internvl": "internvl:InternVl",
    "smolvlm": "smolvlm:SmolVlm",
    "idefics3": "idefics3:Idefics3",
    "qwen3_vl": "qwen3_vl:Qwen3Vl",
    "paligemma": "paligemma:PaliGemma",
    "gemma3": "gemma3:Gemma3",
    "instructblip": "instructblip:InstructBlip",
}
"""``file:class`` of each family that transformers loads."""

_CROSS = "its layers read the image by cross-attention, so no vision tokens stand among the text's"
_ENCODER = "an encoder reads the image, and its decoder that by cross-attention: no vision tokens stand among the answer's text"
_CODES = "its images are ids of its vocabulary, so no projector makes vision tokens"

REFUSED = {
    **dict.fromkeys(("mllama", "idefics", "blip", "evolla"), _CROSS),
    **dict.fromkeys(("florence2", "pix2struct", "pp_formulanet", "t5gemma2", "udop", "vision-encoder-decoder"), _ENCODER),
    **dict.fromkeys(("chameleon", "emu3"), _CODES),
    "fuyu": "it has no vision tower: a linear layer reads patches of pixels",
    "git": "it puts its vision tokens before the text by itself, so no ids stand for them",
    "pi0": "it answers with movements of a robot, not with text",
    "diffusion_gemma": "it does not predict one token after the other",
}
"""Models that Align-KD cannot be done with, and why."""


def family_class(model_type: str) -> type[TransformersVlm]:
    """The class of a family; for one that is not listed what most families have in common.

    Raises:
        ValueError: the model is known not to fit.
    """
    if model_type in REFUSED:
        raise ValueError(f"model_type {model_type!r} cannot be aligned: {REFUSED[model_type]}")
    if model_type not in FAMILIES:
        return TransformersVlm
    file, name = FAMILIES[model_type].split(":")
    found: type[TransformersVlm] = getattr(import_module(f"{__name__}.{file}"), name)
    return found
