"""Answers to a batch of questions, by greedy decoding."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from alignkd.inputs.batch import ModelInput
from alignkd.models.vlm import Vlm
from alignkd.pipeline.evaluate.decoding import Decoding, generate_ids, texts_of
from alignkd.pipeline.runtime.out_of_memory import is_out_of_memory, out_of_memory_is_transient

T = TypeVar("T")
R = TypeVar("R")
_log = logging.getLogger(__name__)


def answer(vlm: Vlm, questions: Sequence[ModelInput], max_new_tokens: int) -> list[str]:
    """Answers to a batch of questions: greedy, one beam, up to an end token or ``max_new_tokens``."""
    return texts_of(vlm, generate_ids(vlm, questions, Decoding(max_new_tokens)))


def halving(ask: Callable[[Sequence[T]], list[R]], questions: Sequence[T]) -> list[R]:
    """What ``ask`` answers to a batch of questions; one for which memory does not suffice is halved.

    Raises:
        TransientError: memory does not suffice for one question.
    """
    if len(questions) == 1:
        with out_of_memory_is_transient():
            return ask(questions)
    try:
        return ask(questions)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    # Outside of the handler, whose error would keep the tensors of the call.
    _log.warning("memory ran out for %d questions at a time: they are answered in two halves", len(questions))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = len(questions) // 2
    return [found for half in (questions[:middle], questions[middle:]) for found in halving(ask, half)]


@contextmanager
def undisturbed(vlm: Vlm) -> Iterator[None]:
    """Evaluation mode for the duration of a block; modes and the states of torch's generators are afterwards as before."""
    modes = [(module, module.training) for module in vlm.model.modules()]
    devices = [vlm.device] if vlm.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        vlm.model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
