"""What the door offers for attention and vision tokens can be stored, and decoded on the device."""

from __future__ import annotations

import pytest

from alignkd.pipeline.cache_io.targets import row_fields
from alignkd.pipeline.commands.cache_teacher import cache_teacher_command
from alignkd.pipeline.config.targets import TargetSettings
from alignkd.targets.dequantise import DEQUANTISERS

OPTIONS = {p.name: p for p in cache_teacher_command.params if p.name in ("attention_codec", "vision_codec")}


@pytest.mark.parametrize(("option", "codec"), [(name, codec) for name, p in OPTIONS.items() for codec in p.type.choices])
def test_every_codec_on_offer_is_stored_and_decoded_on_the_device(option, codec):
    fields = {field.name: field for field in row_fields(TargetSettings(**{option: codec}), 32_000)}
    assert fields[{"attention_codec": "attention", "vision_codec": "vision_tokens"}[option]].codec == codec
    assert codec in DEQUANTISERS


def test_the_default_codecs_are_those_of_the_settings():
    defaults = {name: option.default for name, option in OPTIONS.items()}
    assert defaults == {"attention_codec": TargetSettings().attention_codec, "vision_codec": TargetSettings().vision_codec}
