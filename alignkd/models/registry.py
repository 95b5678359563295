"""Every model family in one table: which ``model_type`` it reads, which class loads it, and what it does not support.

Records are data, and classes are named by their module, so that this file imports neither torch nor transformers.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from alignkd.errors import CheckpointError, ConfigError

_FAMILIES = "alignkd.models.families"
_NO_SLICE = "slices are made of MobileVLM's parts alone so far"
_QUERIES = "each vision token is what a query of its Q-Former read all over the image"


@dataclass(frozen=True)
class FamilyRecord:
    """One model family. Each of the last three is the reason why something is not supported, or empty where it is."""

    family: str
    model_types: tuple[str, ...]
    """Values of ``model_type`` in ``config.json``."""
    target: str | type[Any]
    """``module:Class`` of the :class:`alignkd.models.vlm.Vlm` that loads it, or the class itself."""
    title: str = ""
    """Name in the table of ``alignkd models``; the family's own where it is empty."""
    without_slice: str = _NO_SLICE
    """Why its targets cannot be recomputed from a slice of the teacher."""
    several_images: str = ""
    """Why a sample may not have several images."""
    without_coordinates: str = ""
    """Why its vision tokens have no coordinates in the image, so that only a model of the same family can be its student."""


UNLISTED = FamilyRecord("transformers", (), "alignkd.models.transformers_vlm:TransformersVlm")
"""What every other image-text-to-text model of transformers is loaded as."""

_RECORDS = [
    FamilyRecord(
        "mobilevlm",
        ("mobilevlm", "mobilevlm_v2"),
        f"{_FAMILIES}.mobilevlm:MobileVlmFamily",
        title="mobilevlm (V1, V2)",
        without_slice="",
    ),
    FamilyRecord("minigpt4", ("minigpt4",), f"{_FAMILIES}.minigpt4:MiniGpt4Family", without_coordinates=_QUERIES),
    FamilyRecord("gemma3", ("gemma3",), f"{_FAMILIES}.gemma3:Gemma3"),
    FamilyRecord("idefics3", ("idefics3",), f"{_FAMILIES}.smolvlm:SmolVlm"),
    FamilyRecord("instructblip", ("instructblip",), f"{_FAMILIES}.instructblip:InstructBlip", without_coordinates=_QUERIES),
    FamilyRecord("internvl", ("internvl",), f"{_FAMILIES}.internvl:InternVl"),
    FamilyRecord("llava", ("llava",), f"{_FAMILIES}.llava:Llava"),
    FamilyRecord("llava_next", ("llava_next",), f"{_FAMILIES}.llava_next:LlavaNext"),
    FamilyRecord("llava_onevision", ("llava_onevision",), f"{_FAMILIES}.llava_onevision:LlavaOnevision"),
    FamilyRecord("paligemma", ("paligemma",), f"{_FAMILIES}.paligemma:PaliGemma"),
    FamilyRecord("qwen2_5_vl", ("qwen2_5_vl",), f"{_FAMILIES}.qwen2_5_vl:Qwen25Vl"),
    FamilyRecord("qwen3_vl", ("qwen3_vl",), f"{_FAMILIES}.qwen3_vl:Qwen3Vl"),
    FamilyRecord("smolvlm", ("smolvlm",), f"{_FAMILIES}.smolvlm:SmolVlm"),
]

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
"""Models that cannot be teacher or student, by ``model_type``, and why."""


def family_records() -> tuple[FamilyRecord, ...]:
    """All records, in the order of the table; registered ones come last."""
    return tuple(_RECORDS)


def find_record(model_type: str) -> FamilyRecord:
    """The record of a ``model_type``; :data:`UNLISTED` where no family names it.

    Raises:
        CheckpointError: the model is one of :data:`REFUSED`.
    """
    if model_type in REFUSED:
        raise CheckpointError(f"model_type {model_type!r} is not supported: {REFUSED[model_type]}")
    return next((record for record in _RECORDS if model_type in record.model_types), UNLISTED)


def register_family(record: FamilyRecord) -> None:
    """Add a family from outside of the package. Every process that loads its models must call this.

    Raises:
        ConfigError: its name or one of its model types is taken or refused, or it names no model type.
    """
    if not record.model_types:
        raise ConfigError(f"the family {record.family!r} names no model_types: give those of its checkpoints' config.json")
    if record.family in {known.family for known in (*_RECORDS, UNLISTED)}:
        raise ConfigError(f"the family {record.family!r} is registered already; register each family once, under its own name")
    for model_type in record.model_types:
        if model_type in REFUSED:
            raise ConfigError(f"model_type {model_type!r} cannot be registered: {REFUSED[model_type]}")
        if (known := find_record(model_type)) is not UNLISTED:
            raise ConfigError(f"model_type {model_type!r} is registered already, by the family {known.family!r}")
    _RECORDS.append(record)


def family_class(record: FamilyRecord) -> type[Any]:
    """The :class:`alignkd.models.vlm.Vlm` of a family; its module is imported here.

    Raises:
        ConfigError: the target is not ``module:Class``, or there is no such module or class.
    """
    if not isinstance(record.target, str):
        return record.target
    module, separator, name = record.target.partition(":")
    if not separator:
        raise ConfigError(f"the family {record.family!r}: target is {record.target!r}, expected 'module:Class'")
    try:
        found: type[Any] = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"the family {record.family!r}: {record.target} cannot be imported ({error})") from error
    return found
