"""One sample as the model sees it: its tokens, the attention of its text to its images, the logits of its answer.

Shapes: H heads, T text rows, V vision columns, D model width, A answer tokens, N ids of the output head.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from alignkd.capture.attention import capture, enable_capture
from alignkd.errors import DataError, SampleError
from alignkd.inputs.prompts import IGNORE
from alignkd.models.loading import load_vlm
from alignkd.models.vlm import Vlm
from alignkd.pipeline.config.show import ShowConfig
from alignkd.pipeline.data.contract import Samples
from alignkd.pipeline.data.open_samples import open_samples
from alignkd.pipeline.data.preparer import Prepared, Preparer
from alignkd.pipeline.data.sample import Sample
from alignkd.pipeline.figures.attention import attention_figure, save_figure
from alignkd.pipeline.hub.models import model_folder, pin_models, tower_folder
from alignkd.pipeline.runtime.devices import parse_dtype, pick_device
from alignkd.pipeline.runtime.files import save_arrays
from alignkd.plugins import load_plugins


@dataclass(frozen=True)
class Shown:
    """The arrays of one sample, by the names that ``--save`` writes, its table of tokens, and figures."""

    arrays: dict[str, np.ndarray]
    tokens: list[dict[str, Any]]
    figures: dict[str, Any]


def show(config: ShowConfig) -> Shown:
    """Run a model on one sample, and collect what Align-KD compares.

    Raises:
        AlignkdError: bad input, no such sample, or a sample that cannot be prepared.
    """
    load_plugins(config.plugins)
    config = pin_models(config)
    sample = find_sample(open_samples(config), config.id)
    vlm = load_vlm(
        model_folder(config.model),
        dtype=parse_dtype(config.dtype),
        device=pick_device(config.device),
        vision_tower=tower_folder(config.vision_tower),
    )
    enable_capture(vlm)
    template = config.template or vlm.default_template
    preparer = Preparer.of(vlm, template=template, max_length=config.max_length, prompt_date=config.prompt_date)
    try:
        prepared = preparer(sample)
    except SampleError as error:
        raise SampleError(f"sample {sample.id!r}: {error}") from error
    arrays = captured_arrays(vlm, prepared)
    if config.save is not None:
        save_arrays(config.save, arrays)
    if config.plot is not None:
        pictures = [np.asarray(image, dtype=np.float32) / 255 for image in preparer.decoded_images(sample)]
        title = f"{sample.id}: first-layer attention from text to vision ({template})"
        regions_R8, pieces = prepared.input.regions_R8, row_pieces(vlm, prepared)
        save_figure(attention_figure(pictures, arrays["attention_HTV"], regions_R8, title, pieces), config.plot)
    figures = {
        "id": sample.id,
        "template": template,
        "ids": len(arrays["input_ids"]),
        "images": len(sample.images),
        "positions": len(arrays["input_ids"]) + len(sample.images) * (vlm.tokens_per_placeholder - 1),
        "text_rows": arrays["attention_HTV"].shape[1],
        "vision_tokens": arrays["vision_tokens_VD"].shape[0],
        "answer_tokens": arrays["answer_logits_AN"].shape[0],
        "attention_on_images": float(arrays["attention_HTV"].sum(axis=2).mean()) if arrays["attention_HTV"].size else 0.0,
        "loss": float(arrays["loss"]),
    }
    return Shown(arrays, token_table(vlm, prepared), figures)


def find_sample(samples: Samples, sample_id: str | None) -> Sample:
    """The sample with an id; without one, the first.

    Raises:
        DataError: no sample has this id.
    """
    if sample_id is None:
        return samples[0]
    for index in range(len(samples)):
        sample = samples[index]
        if sample.id == sample_id:
            return sample
    raise DataError(f"{samples.path} holds no sample with id {sample_id!r}; its first is {samples[0].id!r}")


@torch.inference_mode()
def captured_arrays(vlm: Vlm, prepared: Prepared) -> dict[str, np.ndarray]:
    """One forward pass over one sample; float32 arrays."""
    given = prepared.input
    batch = vlm.collate([given]).to(vlm.device)
    captured = capture(vlm, batch)
    logits_AN = vlm.head(captured.hidden_AD).float()
    return {
        "input_ids": given.input_ids,
        "labels": given.labels,
        "pixel_values": given.images.float().numpy(),
        **{name: value.numpy() for name, value in given.image_inputs.items()},
        **given.token_inputs,
        "attention_HTV": captured.attention[0][0].cpu().numpy(),
        "vision_tokens_VD": captured.vision_BVD[0].float().cpu().numpy(),
        "answer_logits_AN": logits_AN.cpu().numpy(),
        "loss": functional.cross_entropy(logits_AN, batch.answer_ids_A).cpu().numpy(),
    }


def row_pieces(vlm: Vlm, prepared: Prepared) -> list[str]:
    """The text of each row's token, ``[T]``."""
    layout = vlm.collator.expand(prepared.input)
    pieces: list[str] = vlm.tokenizer.convert_ids_to_tokens(layout.input_ids[layout.text_rows].tolist())
    return pieces


def token_table(vlm: Vlm, prepared: Prepared) -> list[dict[str, Any]]:
    """Each token id with its position, its text, where it lies (before or after the image), and whether it is supervised.

    Vision tokens that follow each other are one entry; ``tokens`` is the number of positions that an entry takes.
    """
    given = prepared.input
    layout = vlm.collator.expand(given)
    table, position, seen = list[dict[str, Any]](), 0, False
    for token, label in zip(given.input_ids.tolist(), given.labels.tolist(), strict=True):
        is_image = token == vlm.image_token_id
        width = vlm.tokens_per_placeholder if is_image else 1
        if is_image and width == 1 and table and table[-1]["place"] == "vision":
            table[-1]["tokens"] += 1  # this family writes an id for each vision token
        else:
            place = "vision" if is_image else "after image" if seen else "before image" if prepared.image_sha256 else "text"
            about = {"position": position, "id": token, "tokens": width, "place": place}
            table.append({**about, "piece": "", "supervised": label != IGNORE and position > 0})
        position, seen = position + width, seen or is_image
    assert position == len(layout.input_ids)
    for entry in table:
        count = entry["tokens"]
        is_vision = entry["place"] == "vision"
        entry["piece"] = f"<image: {count} vision tokens>" if is_vision else vlm.tokenizer.convert_ids_to_tokens(entry["id"])
    return table
