"""A model of any family for lmms-eval: ``lmms_eval --model alignkd --model_args pretrained=DIR``.

Interface: ``lmms_eval.api.model.lmms`` of lmms-eval 0.7.3, "simple" models.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from alignkd.errors import ConfigError
from alignkd.models.loading import load_vlm
from alignkd.pipeline.evaluate.decoding import Decoding
from alignkd.pipeline.evaluate.harness.answering import Asked, answers, harness_encoder
from alignkd.pipeline.hub.models import model_folder, tower_folder
from alignkd.pipeline.runtime.devices import parse_dtype, pick_device
from alignkd.pipeline.runtime.progress import progress_bar
from alignkd.plugins import load_plugins

try:
    from lmms_eval.api.model import lmms
except ModuleNotFoundError:  # this module is read without lmms-eval too, for its documentation

    class lmms:  # type: ignore[no-redef]  # noqa: N801 - lmms-eval's name
        """Stands for lmms-eval's base class where lmms-eval is not installed."""


_MAX_NEW_TOKENS = 1024
"""Of an answer, where neither the task nor the user says more: as lmms-eval's own LLaVA."""


class AlignkdModel(lmms):  # type: ignore[misc]
    """A checkpoint folder as lmms-eval asks it: pictures and a text, one answer.

    Args:
        pretrained: folder of the checkpoint.
        batch_size: questions at a time.
        device: ``cpu``, ``cuda``, ``cuda:1``; of several processes each takes the GPU of its local rank.
        dtype: float32, bfloat16 or float16.
        template: prompt template; the model's own where it is left out.
        prompt_date: for a chat template that writes a date.
        vision_tower: folder of the CLIP tower, if the checkpoint names one that is not there.
        max_new_tokens: of an answer, where the task does not say.
        plugin: Python file that registers a model family.

    Raises:
        AlignkdError: an argument is unknown or wrong, or the folder is no checkpoint.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "",
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "float32",
        template: str | None = None,
        prompt_date: str | None = None,
        vision_tower: str | None = None,
        max_new_tokens: int = _MAX_NEW_TOKENS,
        plugin: str | None = None,
        max_batch_size: int | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        del max_batch_size  # for programs that look for a batch size by themselves
        if others or not pretrained:
            wrong = f"unknown {', '.join(sorted(others))}" if others else "no pretrained=DIR"
            raise ConfigError(
                f"--model_args: {wrong}; expected"
                " pretrained=DIR and, if wanted, dtype, device, template, prompt_date, vision_tower, max_new_tokens, plugin"
            )
        self.batch_size = _whole("batch_size", batch_size)
        self.max_new_tokens = _whole("max_new_tokens", max_new_tokens)
        load_plugins([str(plugin)] if plugin else [])
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        several = self._world_size > 1 and device in (None, "cuda")
        self.device = pick_device(None if several else device, int(os.environ.get("LOCAL_RANK", 0)))
        tower = tower_folder(vision_tower)
        folder = model_folder(str(pretrained))
        self.vlm = load_vlm(folder, dtype=parse_dtype(dtype), device=self.device, vision_tower=tower)
        self.encoder = harness_encoder(self.vlm, template, prompt_date)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers in the order of the requests. ``temperature`` above 0 samples; ``until`` cuts.

        Raises:
            AlignkdError: a request holds something else than pictures and a text, or asks for beams.
        """
        asked = [self._asked(request) for request in requests]
        found = dict[int, str]()
        with progress_bar("alignkd", len(asked), "questions") as progress:
            for index, text in answers(self.vlm, self.encoder, asked, self.batch_size):
                found[index] = text
                self.cache_hook.add_partial("generate_until", (asked[index].text, requests[index].args[1]), text)
                progress.advance(1)
        return [found[index] for index in range(len(asked))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not supported.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("alignkd answers tasks of output_type generate_until; it gives no log-likelihoods of choices")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not supported.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("alignkd answers tasks of output_type generate_until; it answers one round of questions")

    def clean(self) -> None:
        """Give memory back; lmms-eval's hook when all answers are there."""
        del self.vlm, self.encoder
        super().clean()

    def _asked(self, request: Any) -> Asked:
        context, settings, doc_to_visual, number, task, split = request.args
        name = f"task {task}, document {number}"

        def pictures() -> list[Any]:
            return [] if doc_to_visual is None else _flat(doc_to_visual(self.task_dict[task][split][number]))

        return Asked(str(context), pictures, self._decoding(settings, name), _until(settings, name), name)

    def _decoding(self, settings: Mapping[str, Any], name: str) -> Decoding:
        if int(settings.get("num_beams") or 1) != 1:
            raise ConfigError(f"{name}: num_beams is {settings['num_beams']}, expected 1: alignkd decodes without beams")
        tokens = settings.get("max_new_tokens")
        temperature = float(settings.get("temperature") or 0)
        top_p = float(settings.get("top_p") or 1) if temperature > 0 else 1.0
        return Decoding(self.max_new_tokens if tokens is None else _whole("max_new_tokens", tokens), temperature, top_p)


def _until(settings: Mapping[str, Any], name: str) -> tuple[str, ...]:
    given = settings.get("until")
    words = given if isinstance(given, list | tuple) else () if given is None else (given,)
    if not all(isinstance(word, str) for word in words):
        raise ConfigError(f"{name}: until is {given!r}, expected a text or a list of texts")
    return tuple(words)


def _flat(visuals: Any) -> list[Any]:
    """Pictures of a document, which tasks give as one, a list, or lists of lists."""
    if visuals is None:
        return []
    return [one for part in visuals for one in _flat(part)] if isinstance(visuals, list | tuple) else [visuals]


def _whole(name: str, value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        raise ConfigError(f"{name} is {value!r}, expected a whole number of 1 or more")
    return number
