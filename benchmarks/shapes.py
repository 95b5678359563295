"""Models, slices, batches and stored targets in the shapes of MobileVLM V2 7B and 1.7B, with random weights.

All widths are divided by a ``scale`` (1 is the true size), so that a processor can run them; layers, positions, vocabulary
and the width of a head stay.

Shapes: A answers, D teacher width, H teacher heads, K kept tokens, N vocabulary, T text rows, V vision columns.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from alignkd.cache_store.codecs import get_codec
from alignkd.cache_store.rows.row import EncodedField
from alignkd.capture.kernel import use_tapped_kernel
from alignkd.capture.teacher_slice import TOWER, TeacherSlice, slice_config, slice_sizes
from alignkd.inputs.batch import Batch, ModelInput, collate
from alignkd.inputs.prompts import IGNORE, IMAGE_TOKEN_ID
from alignkd.models.families.mobilevlm import MobileVlmFamily
from alignkd.models.modules.mobilevlm import MobileVlm, MobileVlmConfig
from alignkd.models.vlm import Vlm
from alignkd.pipeline.cache_io.targets import collate_targets, row_fields
from alignkd.pipeline.config.targets import TargetSettings
from alignkd.targets.batch_targets import Targets
from alignkd.targets.logits import LOGIT_CODECS, Calibration, LogitCodec, LogitSettings

VOCABULARY, BEFORE, AFTER, ANSWERS, VISION_TOKENS = 32_000, 40, 200, 100, 144
TEACHER = {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32}
STUDENT = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16}
TOWER_SHAPE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_NARROW = 256
"""Width of the hidden states that a sketch is fitted to: what it costs in stage two does not depend on them."""


def scaled(shape: dict[str, int], scale: int) -> dict[str, int]:
    """Widths and heads divided, so that heads keep their width; layers and positions stay."""
    return {name: size if name == "num_hidden_layers" else size // scale for name, size in shape.items()}


def config(shape: dict[str, int], scale: int) -> MobileVlmConfig:
    vision = CLIPVisionConfig(**scaled(TOWER_SHAPE, scale), image_size=336, patch_size=14)
    text = LlamaConfig(**scaled(shape, scale), vocab_size=VOCABULARY, pad_token_id=0)
    return MobileVlmConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), vision_feature_layer=-2)


@contextlib.contextmanager
def built_on(device: str) -> Iterator[None]:
    with torch.device(device):
        yield


def make_vlm(shape: dict[str, int], scale: int, device: str, dtype: torch.dtype = torch.float32) -> Vlm:
    """A model with random weights, the same each time."""
    torch.manual_seed(0)
    with built_on(device):
        model = MobileVlm(config(shape, scale)).to(dtype)
    vlm = MobileVlmFamily(model.eval(), tokenizer=None, folder=Path(), images=None)  # type: ignore[arg-type]
    use_tapped_kernel(vlm)
    vlm.captures = True  # comparing it with itself needs a tokenizer
    return vlm


def describe_teacher(scale: int) -> dict[str, dict[str, Any]]:
    with built_on("meta"):
        return slice_config(MobileVlm(config(TEACHER, scale)))


def make_slice(scale: int, device: str, dtype: torch.dtype, *, tower: bool = False) -> TeacherSlice:
    """The 7B teacher's, with a tower of its own or sharing the student's."""
    description = describe_teacher(scale)
    sizes = {group: size for group, size in slice_sizes(description).items() if tower or group != TOWER}
    flat = {group: torch.empty(size, dtype=dtype, device=device).normal_(std=0.02) for group, size in sizes.items()}
    return TeacherSlice(description, flat, device=device)


def batch_of(samples: int, *, before: int = BEFORE, after: int = AFTER, answers: int = ANSWERS) -> Batch:
    """Samples of one image, ``before`` and ``after`` tokens of text around it, the last ``answers`` of them supervised."""
    generator = np.random.default_rng(0)
    pixels = torch.Generator().manual_seed(0)
    inputs = []
    for _ in range(samples):
        ids = np.concatenate([token_ids(generator, before), [IMAGE_TOKEN_ID], token_ids(generator, after)])
        labels = np.where(np.arange(len(ids)) < len(ids) - answers, IGNORE, ids)
        inputs.append(ModelInput(ids, labels, torch.randn(1, 3, 336, 336, generator=pixels)))
    return collate(inputs, tokens_per_placeholder=VISION_TOKENS, pad_token_id=0)


def token_ids(generator: np.random.Generator, count: int) -> np.ndarray:
    """Ids as frequent as words are: by Zipf's law."""
    weights = 1 / np.arange(3, VOCABULARY)
    return generator.choice(np.arange(3, VOCABULARY), count, p=weights / weights.sum())


def make_logit_codec() -> LogitCodec:
    """The default one, fitted to hidden states in few directions."""
    settings, generator = LogitSettings(), torch.Generator().manual_seed(0)
    hidden_MD = torch.randn(512, _NARROW, generator=generator) * 2 * torch.arange(1, _NARROW + 1) ** -0.5
    head_ND = torch.randn(VOCABULARY, _NARROW, generator=generator)
    codec_type = LOGIT_CODECS[settings.kind]
    mean_N = torch.full((VOCABULARY,), 1 / VOCABULARY)
    return codec_type(settings, codec_type.calibrate(settings, Calibration(hidden_MD, head_ND, None, mean_N)))


def stored_targets(batch: Batch, scale: int, targets: tuple[str, ...], logit_codec: LogitCodec) -> Targets:
    """What the loader hands over: the default cache's small integers, of random values."""
    settings = TargetSettings(targets)
    generator = torch.Generator().manual_seed(0)
    shape = scaled(TEACHER, scale)
    owners = batch.answer_samples_A.numpy()
    answers = _answers(batch, logit_codec, generator) if "logits" in targets else {}
    rows = []
    for i in range(batch.samples):
        values = {name: value[owners == i] for name, value in answers.items()}
        if "attention" in targets:
            size = (shape["num_attention_heads"], int(batch.text_mask_BT[i].sum()), int(batch.vision_mask_BV[i].sum()))
            values["attention"] = torch.randn(size, generator=generator).softmax(dim=2).numpy()
        if "vision" in targets:
            size = (int(batch.vision_mask_BV[i].sum()), shape["hidden_size"])
            values["vision_tokens"] = torch.randn(size, generator=generator).numpy()
        rows.append(_stored(settings, values))
    return collate_targets(rows, batch)


def _answers(batch: Batch, codec: LogitCodec, generator: torch.Generator) -> dict[str, np.ndarray]:
    labels_A = batch.answer_ids_A
    hidden_AD = torch.randn(len(labels_A), _NARROW, generator=generator)
    made = []
    for start in range(0, len(labels_A), 256):
        part = slice(start, start + 256)
        logits_AN = 3 * torch.randn(len(labels_A[part]), VOCABULARY, generator=generator)
        made.append(codec.encode(hidden_AD[part], logits_AN, labels_A[part], torch.empty(0)))
    fields = codec.fields(codec.settings, VOCABULARY)
    return {name: torch.cat([part[name] for part in made]).numpy().astype(fields[name].dtype) for name in fields}


def _stored(settings: TargetSettings, values: dict[str, np.ndarray]) -> dict[str, EncodedField]:
    fields = {field.name: field for field in row_fields(settings, VOCABULARY) if field.name in values}
    return {
        name: EncodedField(field, values[name].shape, get_codec(field.codec).encode(values[name]))
        for name, field in fields.items()
    }
