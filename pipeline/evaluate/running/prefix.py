"""What questions about one picture have in common is computed once: keys and values of the prompt up to its vision tokens.

Shapes: N pictures, F positions of the common prompt, B questions, S positions of a whole prompt, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import Cache, DynamicCache

from alignkd.inputs.batch import ModelInput
from alignkd.models.families.mobilevlm import MobileVlmFamily
from alignkd.models.vlm import Vlm
from alignkd.pipeline.evaluate.decoding import Decoding, generate_ids, texts_of, up_to_end
from alignkd.pipeline.evaluate.roomy_cache import roomy_cache
from alignkd.pipeline.evaluate.running.schedule import ANSWER_TOKENS


@dataclass(frozen=True)
class SharedPrompts:
    """The common prompts of some pictures: ``length`` F, ids ``[F]`` with vision tokens, keys and values of N rows a layer."""

    rows: Mapping[str, int]
    ids_F: torch.Tensor
    layers: Sequence[tuple[torch.Tensor, torch.Tensor]]

    @property
    def length(self) -> int:
        """F: positions of each."""
        return len(self.ids_F)

    def of(self, pictures: Sequence[str], device: torch.device, room: int) -> Cache:
        """A cache with a row for each question, and with room for so many more positions."""
        return roomy_cache(self.layers, torch.tensor([self.rows[picture] for picture in pictures], device=device), room)


def common_prompt(vlm: Vlm, given: ModelInput) -> np.ndarray | None:
    """Ids of a question up to its one picture; None where that is not how a family sees it, or nothing follows."""
    if not isinstance(vlm, MobileVlmFamily) or len(given.images) != 1:
        return None
    (places,) = np.nonzero(given.input_ids == vlm.image_token_id)
    if len(places) != 1 or places[0] + 1 == len(given.input_ids):
        return None
    ids: np.ndarray = given.input_ids[: places[0] + 1]
    return ids


@torch.no_grad()
def share_prompts(vlm: Vlm, questions: Mapping[str, ModelInput]) -> SharedPrompts:
    """The common prompts of pictures, each from a question about it; all begin with the same ids."""
    assert isinstance(vlm, MobileVlmFamily)
    ids = common_prompt(vlm, next(iter(questions.values())))
    assert ids is not None, "made of questions that have one"
    given = [ModelInput(ids, np.full_like(ids, -100), question.images) for question in questions.values()]
    batch = vlm.collate(given).to(vlm.device)
    vision = vlm.encode_images(batch)
    assert vision is not None, "each has a picture"
    embeddings_NFD = vlm.model.model.embed(batch.input_ids_BS, vision.tokens_MD, batch.vision_positions)
    cache = DynamicCache()
    vlm.decoder(inputs_embeds=embeddings_NFD, past_key_values=cache, use_cache=True)
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    return SharedPrompts({name: row for row, name in enumerate(questions)}, batch.input_ids_BS[0], layers)


def answer_sharing(vlm: Vlm, questions: Sequence[ModelInput], max_new_tokens: int) -> list[str]:
    """As :func:`.generation.answer`; questions whose image is one tensor share what they begin with."""
    return texts_of(vlm, ids_sharing(vlm, questions, Decoding(max_new_tokens)))


def ids_sharing(
    vlm: Vlm, questions: Sequence[ModelInput], decoding: Decoding, uniforms_BN: np.ndarray | None = None
) -> list[list[int]]:
    """As :func:`.decoding.generate_ids`; questions whose image is one tensor share what they begin with."""
    groups: dict[bytes, dict[str, list[int]]] = {}
    for place, given in enumerate(questions):
        ids = common_prompt(vlm, given)
        if ids is not None:
            groups.setdefault(ids.tobytes(), {}).setdefault(str(given.images.data_ptr()), []).append(place)
    ids_of = dict[int, list[int]]()

    def numbers_of(places: Sequence[int]) -> np.ndarray | None:
        return None if uniforms_BN is None else uniforms_BN[list(places)]

    for pictures in groups.values():
        several = {name: places for name, places in pictures.items() if len(places) > 1}
        if several:
            shared = share_prompts(vlm, {name: questions[places[0]] for name, places in several.items()})
            named = [(name, place) for name, places in several.items() for place in places]
            asked, places = [(name, questions[place]) for name, place in named], [place for _, place in named]
            ids_of |= zip(places, ids_after(vlm, shared, asked, decoding, numbers_of(places)), strict=True)
    if alone := [place for place in range(len(questions)) if place not in ids_of]:
        found = generate_ids(vlm, [questions[place] for place in alone], decoding, uniforms_BN=numbers_of(alone))
        ids_of |= zip(alone, found, strict=True)
    return [ids_of[place] for place in range(len(questions))]


def answer_after(
    vlm: Vlm, shared: SharedPrompts, questions: Sequence[tuple[str, ModelInput]], max_new_tokens: int
) -> list[str]:
    """As :func:`alignkd.pipeline.evaluate.running.generation.answer`, of questions with the picture of each."""
    return texts_of(vlm, ids_after(vlm, shared, questions, Decoding(max_new_tokens)))


@torch.no_grad()
def ids_after(
    vlm: Vlm,
    shared: SharedPrompts,
    questions: Sequence[tuple[str, ModelInput]],
    decoding: Decoding,
    uniforms_BN: np.ndarray | None = None,
) -> list[list[int]]:
    """As :func:`alignkd.pipeline.evaluate.decoding.generate_ids`, of questions with the picture of each.

    Between the common prompt and the rest of a shorter question lies padding, which is masked; positions do not count it.
    """
    rest = [given.input_ids[len(common_prompt(vlm, given)) :] for _, given in questions]  # type: ignore[arg-type]
    longest = max(map(len, rest))
    room = longest + min(decoding.max_new_tokens, ANSWER_TOKENS)
    ids_BS = torch.full((len(rest), shared.length + longest), vlm.pad_token_id)
    ids_BS[:, : shared.length] = shared.ids_F
    mask_BS = torch.zeros_like(ids_BS)
    mask_BS[:, : shared.length] = 1
    for row, ids in enumerate(rest):
        ids_BS[row, -len(ids) :] = torch.from_numpy(ids)
        mask_BS[row, -len(ids) :] = 1
    output = vlm.model.generate(
        input_ids=ids_BS.to(vlm.device),
        attention_mask=mask_BS.to(vlm.device),
        past_key_values=shared.of([picture for picture, _ in questions], vlm.device, room),
        **decoding.drawing(uniforms_BN),
        eos_token_id=vlm.end_token_ids,
        pad_token_id=vlm.pad_token_id,
    )
    return [up_to_end(ids, vlm.end_token_ids) for ids in output[:, ids_BS.shape[1] :].tolist()]
