"""The families: one file each, by the ``model_type`` of its configuration."""

from importlib import import_module

from alignkd.models.transformers_vlm import TransformersVlm

FAMILIES = {
    "llava": "llava:Llava",
    "qwen2_5_vl": "qwen2_5_vl:Qwen25Vl",
}
"""``file:class`` of each family that transformers loads."""

REFUSED = {
    "mllama": "its layers read the image by cross-attention, so no vision tokens stand among the text's",
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
