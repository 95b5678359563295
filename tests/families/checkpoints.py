"""Every family's tiny checkpoint, and what it can be asked: the list that the conformance suite runs over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import make_aya_vision
import make_gemma3
import make_idefics3
import make_instructblip
import make_internvl
import make_llava
import make_llava_next
import make_llava_onevision
import make_minigpt4
import make_mobilevlm_v1
import make_paligemma
import make_qwen2_5_vl
import make_qwen2_vl
import make_qwen3_vl
import make_smolvlm
import make_vipllava
from PIL import Image

Turns = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class TinyFamily:
    """``write(folder, seed)`` makes a checkpoint of random weights; the tokenizer does not depend on the seed.

    ``end``: the text that ends an answer's turn; ``template_ends``: whether the chat template writes it.
    ``covers``: what part of an image the boxes of its vision tokens cover; "padded": the whole and borders around it.
    ``plain``: what the model itself takes for a conversation, ``[1, S]`` each, without alignkd; None: the processor's chat
    template is asked. With ``opened`` the last answer is about to begin.
    ``keeps_quirks``: its prompts are its training code's to the letter, which neither refuses special tokens nor counts ids of
    text alone. ``takes_system``: whether its prompts have a place for a system turn. ``reach``: how far beside its box, in
    boxes, a vision token may see best.
    """

    write: Callable[[Path, int], None]
    end: str
    template_ends: bool = True
    covers: Literal["whole", "padded", "middle", "nothing"] = "whole"
    several_turns: bool = True
    several_images: bool = True
    without_image: bool = True
    image_after_text: bool = True
    plain: Callable[[Path, Turns, Sequence[Image.Image], bool], dict[str, Any]] | None = None
    keeps_quirks: bool = False
    takes_system: bool = True
    reach: float = 0.25


FAMILIES = {
    "llava": TinyFamily(make_llava.write, "</s>", template_ends=False, covers="middle"),
    "llava_next": TinyFamily(make_llava_next.write, "</s>"),
    "llava_onevision": TinyFamily(make_llava_onevision.write, "<|im_end|>", covers="padded"),
    "qwen2_5_vl": TinyFamily(make_qwen2_5_vl.write, "<|im_end|>"),
    "internvl": TinyFamily(make_internvl.write, "<|im_end|>"),
    "smolvlm": TinyFamily(make_smolvlm.write, "<end_of_utterance>"),
    "idefics3": TinyFamily(make_idefics3.write, "<end_of_utterance>"),
    "qwen3_vl": TinyFamily(make_qwen3_vl.write, "<|im_end|>"),
    "paligemma": TinyFamily(
        make_paligemma.write,
        "<eos>",
        several_turns=False,
        without_image=False,
        plain=make_paligemma.plain,
        takes_system=False,
    ),
    "gemma3": TinyFamily(make_gemma3.write, "<end_of_turn>", takes_system=False),
    "instructblip": TinyFamily(
        make_instructblip.write, "</s>", covers="nothing", plain=make_instructblip.plain, takes_system=False
    ),
    "minigpt4": TinyFamily(make_minigpt4.write, "###", covers="nothing", plain=make_minigpt4.plain),
    # Its last convolution is centred on every second patch, half a patch beside the middle of a token's box, and three wide.
    "mobilevlm_v1": TinyFamily(
        make_mobilevlm_v1.write, "</s>", covers="padded", plain=make_mobilevlm_v1.plain, keeps_quirks=True, reach=0.75
    ),
    # Of these alignkd knows nothing but what all models have in common.
    "vipllava": TinyFamily(make_vipllava.write, "</s>", template_ends=False, covers="nothing"),
    "aya_vision": TinyFamily(make_aya_vision.write, "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", covers="nothing"),
    "qwen2_vl": TinyFamily(make_qwen2_vl.write, "<|im_end|>", covers="nothing"),
}
