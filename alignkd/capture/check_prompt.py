"""The prompt that a model is compared with itself on: an image of noise, a question, an answer, and plain text after it.

It is longer than what windows, chunks and selected blocks of the configuration let a row see, up to a ceiling: so many
positions that a pass takes 4e12 multiplications of a weight on a CPU (a minute on a few cores) or 1e14 elsewhere, and that the
slow kernel's scores take a quarter of a GPU's free memory, or 4 GB of the host's.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from alignkd.errors import CheckpointError
from alignkd.inputs.batch import ModelInput
from alignkd.inputs.prompts import IGNORE, PromptError
from alignkd.models.vlm import Vlm

ANSWERS = 32
"""Positions at the end of the prompt whose logits are compared."""
_TEXT = 64
"""Positions beyond what a row can see."""
_WORK = {"cpu": 4e12}
_WORK_ELSEWHERE = 1e14
_HOST_SCORES = 2**32
_REACH = re.compile(r"window|chunk_size|index_topk$|attention_span")
_BLOCK, _BLOCKS = re.compile(r"block_size"), re.compile(r"(topk|local|init|num|selected)_blocks")


def noise_prompt(vlm: Vlm) -> ModelInput:
    """A question about an image of noise, and its answer, in the first template that takes it."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8))
    error: Exception = CheckpointError(f"{vlm.folder}: it has no prompt template")
    for template in vlm.templates:
        try:
            encoder = vlm.encoder(template, 2**20)
            return encoder.encode([("human", "<image>\na"), ("gpt", "b")], [encoder.load(image)])[0]
        except (CheckpointError, PromptError) as refused:
            error = refused
    raise CheckpointError(f"{vlm.folder}: prompts of this model cannot be made: {error}") from error


def lengthened(vlm: Vlm, prompt: ModelInput, positions: int) -> ModelInput:
    """The prompt with plain text after it; its last :data:`ANSWERS` ids are supervised."""
    words = "the quick brown fox jumps over a lazy dog while seven large boxes of 0123456789 red and blue letters wait, unread"
    plain = sorted({*vlm.tokenizer(words, add_special_tokens=False).input_ids} - {*vlm.tokenizer.all_special_ids})
    assert plain, "a tokenizer has ids for plain words"
    more = np.random.default_rng(1).choice(plain, positions).astype(prompt.input_ids.dtype)
    labels = np.full(len(prompt.labels) + positions, IGNORE, dtype=prompt.labels.dtype)
    labels[-ANSWERS:] = more[-ANSWERS:]
    return replace(
        prompt,
        input_ids=np.concatenate([prompt.input_ids, more]),
        labels=labels,
        token_inputs={name: np.pad(value, (0, positions), mode="edge") for name, value in prompt.token_inputs.items()},
    )


def length_beyond_reach(vlm: Vlm, prompt: int) -> int:
    """Positions of text to add to a prompt of so many."""
    weights = sum(parameter.numel() for parameter in vlm.model.parameters())
    work = _WORK.get(vlm.device.type, _WORK_ELSEWHERE)
    free = torch.cuda.mem_get_info(vlm.device)[0] if vlm.device.type == "cuda" else 4 * _HOST_SCORES
    most = [work / max(weights, 1), (free / 4 / (12 * vlm.heads)) ** 0.5]  # scores, their mask and their softmax in float32
    most.append(getattr(vlm.text_config, "max_position_embeddings", None) or float("inf"))
    return max(ANSWERS + 1, min(_reach(vlm.text_config.to_dict()) + _TEXT, int(min(most)) - prompt))


def _reach(config: Mapping[str, Any]) -> int:
    """Positions that a row sees at most where the configuration limits them; 0 where it does not."""
    numbers = {name: value for name, value in config.items() if isinstance(value, int) and not isinstance(value, bool)}
    reach = [value for name, value in numbers.items() if _REACH.search(name)]
    blocks = sum(value for name, value in numbers.items() if _BLOCKS.search(name))
    reach += [value * (blocks + 2) for name, value in numbers.items() if _BLOCK.search(name)]
    reach += [_reach(value) for value in config.values() if isinstance(value, dict)]
    return max(reach, default=0)
