"""The questions of a window in batches of like length; what several about one picture begin with is computed once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from alignkd.inputs.batch import ModelInput
from alignkd.models.vlm import Vlm
from alignkd.pipeline.evaluate.running.generation import answer, halving, undisturbed
from alignkd.pipeline.evaluate.running.prefix import SharedPrompts, answer_after, common_prompt, share_prompts
from alignkd.pipeline.evaluate.running.schedule import like_length_batches
from alignkd.pipeline.runtime.out_of_memory import out_of_memory_is_transient

Ask = Callable[[], list[str]]

POSITIONS_ON_CPU = 4096
"""Positions of a batch on a CPU: what more of them need leaves its caches, and each operation asks the system for new pages."""


@dataclass(frozen=True)
class Batches:
    """How the questions of a window are put to a model.

    ``batch_tokens``: positions of a batch, at most; ``most``: its questions, where 1 puts each whole and by itself.
    """

    vlm: Vlm
    max_new_tokens: int
    batch_tokens: int
    most: int | None = None

    def __call__(self, made: Mapping[int, ModelInput]) -> Iterator[tuple[list[int], Ask]]:
        """Names of the questions of each batch, and what answers them.

        Questions are about one picture where their images are one tensor.

        Raises:
            TransientError: memory does not suffice for what questions have in common; an answer raises it for one question.
        """
        alone, together = self._by_prompt(made)
        for names in self._like_lengths(alone, made):
            given = [made[name] for name in names]
            yield names, partial(halving, lambda some: answer(self.vlm, some, self.max_new_tokens), given)
        for pictures in together:
            shared = self._shared({picture: made[names[0]] for picture, names in pictures.items()})
            picture_of = {name: picture for picture, names in pictures.items() for name in names}
            for names in self._like_lengths(list(picture_of), made):
                asked = [(picture_of[name], made[name]) for name in names]
                ask = partial(answer_after, self.vlm, shared, max_new_tokens=self.max_new_tokens)
                yield names, partial(halving, ask, asked)

    @property
    def _positions(self) -> int:
        return min(self.batch_tokens, POSITIONS_ON_CPU) if self.vlm.device.type == "cpu" else self.batch_tokens

    def _by_prompt(self, made: Mapping[int, ModelInput]) -> tuple[list[int], list[dict[str, list[int]]]]:
        """Questions that are answered whole; and pictures with several questions each, as many as the budget has room for."""
        if self.most == 1:
            return list(made), []
        groups: dict[tuple[bytes, str], list[int]] = {}
        alone = list[int]()
        for name, given in made.items():
            ids = common_prompt(self.vlm, given)
            if ids is None:
                alone.append(name)
            else:
                groups.setdefault((ids.tobytes(), str(given.images.data_ptr())), []).append(name)
        together, last = list[dict[str, list[int]]](), b""
        for (prompt, picture), names in sorted(groups.items(), key=lambda group: group[0][0]):
            if len(names) == 1:
                alone.extend(names)
                continue
            most = max(1, self._positions // (2 * self._length_of_prompt(made[names[0]])))
            if not together or prompt != last or len(together[-1]) == most:
                together.append({})
            together[-1][picture], last = names, prompt
        return alone, together

    def _shared(self, questions: dict[str, ModelInput]) -> SharedPrompts:
        with undisturbed(self.vlm), out_of_memory_is_transient():
            return share_prompts(self.vlm, questions)

    def _like_lengths(self, names: Sequence[int], made: Mapping[int, ModelInput]) -> Iterator[list[int]]:
        lengths = [self._length(made[name].input_ids) for name in names]
        for batch in like_length_batches(lengths, self.max_new_tokens, self._positions, self.most):
            yield [names[place] for place in batch]

    def _length_of_prompt(self, given: ModelInput) -> int:
        ids = common_prompt(self.vlm, given)
        assert ids is not None, "asked of questions that have one"
        return self._length(ids)

    def _length(self, ids: np.ndarray) -> int:
        return len(ids) + int((ids == self.vlm.image_token_id).sum()) * (self.vlm.tokens_per_placeholder - 1)
