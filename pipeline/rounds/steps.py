"""The steps of all rounds, each one command of alignkd, and what it leaves in the folder of the rounds.

``OUT/cache``: the teacher's targets for the data. ``OUT/round-N/answers-K.jsonl``: the student's answers to a share of the
prompts of dataset K; ``round-N/cache``: the targets for them; ``round-N/run``: the student that learned from both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from alignkd.pipeline.config.rounds import RoundsConfig
from alignkd.pipeline.data.contract import Source
from alignkd.pipeline.rounds.mixture import Dataset, write_mixture

Counted = Sequence[tuple[Source, int]]
"""The datasets, and how many samples each has."""


@dataclass(frozen=True)
class Step:
    """One command. ``name``: by which it is known to be done. ``command``: its section in the settings file.

    ``mixture``: the data it reads, written before it starts: where, and what; ``answers``: the student's, by their name.
    """

    name: str
    command: str
    arguments: tuple[str, ...]
    folder: Path
    mixture: tuple[Path, tuple[Dataset, ...]] | None = None
    answers: Mapping[str, Path] = field(default_factory=dict)

    def prepare(self) -> None:
        """Write what the command reads."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.mixture is not None:
            path, data = self.mixture
            write_mixture(path, (*data, *(Dataset.of_answers(name, file) for name, file in self.answers.items())))


@dataclass(frozen=True)
class Plan:
    """All steps, in order. ``sampled``: whether the settings say at which temperature the student answers."""

    config: RoundsConfig
    data: Counted
    teacher: str
    student: str
    sampled: bool

    @property
    def out(self) -> Path:
        """The folder of the rounds."""
        return Path(self.config.out).absolute()

    @property
    def cache(self) -> str:
        """The cache of the data."""
        return self.config.cache or str(self.out / "cache")

    def steps(self) -> list[Step]:
        """The cache of the data unless there is one, and three kinds of steps a round."""
        found = [] if self.config.cache else [self._cache_data()]
        student = self.student
        for number in range(1, self.config.rounds + 1):
            found += [*self._answers(number, student), self._cache_answers(number), self._train(number, student)]
            student = str(self.folder(number) / "run" / "student")
        return found

    def folder(self, number: int) -> Path:
        """The folder of a round, from 1."""
        return self.out / f"round-{number}"

    def answers(self, number: int, dataset: int) -> Path:
        """The student's answers to a dataset in a round."""
        return self.folder(number) / f"answers-{dataset}.jsonl"

    def _datasets(self) -> tuple[Dataset, ...]:
        return tuple(Dataset.of(source) for source, _ in self.data)

    def _own_answers(self, number: int) -> dict[str, Path]:
        named = enumerate(self._datasets())
        return {f"answers to {one.name}": self.answers(number, place) for place, one in named if self._asked(place)}

    def _asked(self, place: int) -> int:
        """How many prompts of a dataset are answered in a round."""
        return round(self.config.on_policy_share * self.data[place][1])

    def _cache_data(self) -> Step:
        mixture = self.out / "data.yaml"
        arguments = ("--data", str(mixture), "--cache", self.cache, *self._turns())
        return Step("cache", "cache-teacher", arguments, self.out, (mixture, self._datasets()))

    def _answers(self, number: int, student: str) -> list[Step]:
        seed = self.config.seed + number
        found = []
        for place, (source, _) in enumerate(self.data):
            if not self._asked(place):
                continue
            arguments = ["--model", student, "--data", source.data, "--out", str(self.answers(number, place))]
            arguments += ["--sample", str(self._asked(place)), "--sample-seed", str(seed), "--seed", str(seed), *self._turns()]
            arguments += [] if source.images is None else ["--images", source.images]
            arguments += [] if source.limit is None else ["--limit", str(source.limit)]
            arguments += [] if self.sampled else ["--temperature", "1"]
            found.append(Step(f"round-{number}/answers-{place}", "answer", tuple(arguments), self.folder(number)))
        return found

    def _cache_answers(self, number: int) -> Step:
        folder, mixture = self.folder(number), self.folder(number) / "answers.yaml"
        arguments = ("--data", str(mixture), "--cache", str(folder / "cache"), "--calibration-from", self.cache)
        return Step(f"round-{number}/cache", "cache-teacher", arguments, folder, (mixture, ()), self._own_answers(number))

    def _train(self, number: int, student: str) -> Step:
        folder, share = self.folder(number), self.config.on_policy_share
        data = tuple(one.weighted(1 - share) for one in self._datasets()) if share < 1 else ()
        caches = [self.cache, str(folder / "cache")] if data else [str(folder / "cache")]
        arguments = ["--data", str(folder / "mixture.yaml"), "--student", student, "--out", str(folder / "run")]
        arguments += [word for cache in caches for word in ("--cache", cache)]
        arguments += ["--seed", str(self.config.seed + number), *self._turns()]
        if number > 1:
            arguments += ["--adapters-of", str(self.folder(number - 1) / "run")]
        mixture = folder / "mixture.yaml", data
        return Step(f"round-{number}/run", "distill", tuple(arguments), folder, mixture, self._own_answers(number))

    def _turns(self) -> tuple[str, ...]:
        return ("--merge-turns",) if self.config.merge_turns else ()
