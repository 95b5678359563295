"""Samples as stage one judges them: by the model's own encoder, with images of the sizes that were found; no model runs."""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from PIL import Image

from alignkd.errors import SampleError
from alignkd.inputs.encoder import Encoder
from alignkd.models.loading import describe_vlm, load_vlm
from alignkd.models.vlm import Vlm
from alignkd.pipeline.check.image_facts import Facts
from alignkd.pipeline.check.verdicts import Verdict
from alignkd.pipeline.config.check import CheckConfig
from alignkd.pipeline.config.shared import DEFAULT_MAX_LENGTH
from alignkd.pipeline.data.preparer import Preparer
from alignkd.pipeline.data.sample import Sample
from alignkd.pipeline.hub.models import model_folder, pin_models, tower_folder

ASSUMED_SIZE = (336, 336)
"""Of every image, where images are not read."""
_SIZES_KEPT = 8


@dataclass
class FactsPreparer(Preparer):
    """A preparer that reads no image: it knows which can be read, and how large they are.

    No sample is rejected for what its pixels show, so a black image of the same size gives the same verdict.
    """

    facts: Facts | None = None

    def __post_init__(self) -> None:
        self._black = lru_cache(_SIZES_KEPT)(self._load_black)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_black"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    def _size(self, place: str) -> tuple[int, int]:
        if self.facts is None:
            return ASSUMED_SIZE
        if fault := self.facts.fault(place)[0]:
            raise SampleError(fault)
        return self.facts.size(place)

    def _load_image(self, place: str) -> tuple[str, Any]:
        if self.facts is not None and (fault := self.facts.fault(place)[1]):
            raise SampleError(fault)
        return "", self._black(self._size(place))

    def _load_black(self, size: tuple[int, int]) -> Any:
        return self.encoder.load(Image.new("RGB", size))


@dataclass
class ModelJudge:
    """Judges a sample as ``cache-teacher`` does. ``tokens_per_placeholder``: vision tokens of an image's id."""

    encoder: Encoder
    tokens_per_placeholder: int
    facts: Facts | None
    preparer: FactsPreparer = field(init=False)

    def __post_init__(self) -> None:
        self.preparer = FactsPreparer(self.encoder, facts=self.facts)

    def __call__(self, sample: Sample) -> Verdict:
        """Judge a sample; its length is in positions, vision tokens among them."""
        try:
            prepared = self.preparer.with_images(sample, self.preparer.text(sample))
        except SampleError as error:
            reason = str(error)
            return Verdict(reason=reason, place=next((place for place in sample.places if place in reason), ""))
        length = len(prepared.input.input_ids) + len(sample.images) * (self.tokens_per_placeholder - 1)
        return Verdict(length, cut=prepared.truncated)


@dataclass(frozen=True)
class CheckedModel:
    """A model's encoder, and what the report says of it. ``has_weights``: its family cannot be described without them."""

    encoder: Encoder
    tokens_per_placeholder: int
    template: str
    family: str
    has_weights: bool


def open_model(config: CheckConfig) -> CheckedModel:
    """The encoder of a checkpoint, without its weights where its family allows that.

    Raises:
        AlignkdError: it is no checkpoint, or does not know the template.
    """
    config = pin_models(config)
    assert config.model is not None
    folder, tower = model_folder(config.model), tower_folder(config.vision_tower)
    described: Vlm | None = describe_vlm(folder, vision_tower=tower)
    vlm = load_vlm(folder, vision_tower=tower) if described is None else described
    template = config.template or vlm.default_template
    encoder = Preparer.of(
        vlm,
        template=template,
        max_length=config.max_length or DEFAULT_MAX_LENGTH,
        with_spans=False,
        prompt_date=config.prompt_date,
    ).encoder
    return CheckedModel(encoder, vlm.tokens_per_placeholder, template, vlm.family, described is None)
