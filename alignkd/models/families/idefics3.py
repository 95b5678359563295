"""Idefics3: SmolVLM's way with images, before a Llama 3."""

from dataclasses import dataclass
from typing import ClassVar

from alignkd.models.families.smolvlm import SmolVlm


@dataclass
class Idefics3(SmolVlm):
    """``Idefics3ForConditionalGeneration``."""

    family: ClassVar[str] = "idefics3"
