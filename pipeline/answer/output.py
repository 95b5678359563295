"""Answers of all processes to one data file, in the order of the samples, put in its place in one step."""

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from alignkd.errors import DataError, SampleError
from alignkd.pipeline.answer.images import ImageReferences
from alignkd.pipeline.answer.parts import AnswerParts
from alignkd.pipeline.answer.records import record_of
from alignkd.pipeline.answer.work import Work
from alignkd.pipeline.config.answer import AnswerConfig
from alignkd.pipeline.data.contract import Samples
from alignkd.pipeline.data.rejected_samples import RejectedSamples
from alignkd.pipeline.evaluate.running.part_lines import AGAIN
from alignkd.pipeline.runtime.out_folder.write_faults import explained_write_faults
from alignkd.pipeline.runtime.printable import json_text

_NAMED = 20
"""Samples of each kind that are named; the others are counted."""


@dataclass
class Tally:
    """How many answers there are of each kind, and the first ids of those that are left out or differ."""

    counts: dict[str, int] = field(default_factory=dict)
    named: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, name: str = "") -> None:
        """Count one; with a name, it is named."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        names = self.named.setdefault(kind, [])
        if name and len(names) < _NAMED:
            names.append(name)


def write_answers(
    config: AnswerConfig,
    samples: Samples,
    work: Work,
    parts: AnswerParts,
    provenance: Mapping[str, Any],
    references: ImageReferences,
) -> dict[str, Any]:
    """Write the data file, and return its figures.

    Raises:
        DataError: too many samples are rejected, or no answer is left.
        TransientError, CheckpointError: it cannot be written.
    """
    rejects, tally, written = RejectedSamples(config.max_rejected, len(work.order)), Tally(), 0
    for index in work.order.tolist():
        if not parts.is_answered(index):
            rejects.note(_name(samples, index), parts.rejected[index], key=samples.key(index))
    rejects.check()
    out = Path(config.out)
    with _replaced(out) as file:
        as_list = out.suffix == ".json"
        for index in range(len(samples)):
            for record in _records(config, samples, int(work.first[index]), index, parts, provenance, references, tally):
                file.write((",\n" if written else "[\n") if as_list else "")
                file.write(json_text(record) + ("" if as_list else "\n"))
                written += 1
        file.write("\n]\n" if as_list else "")
        if not written:
            raise DataError(
                f"no answer is left to write to {out}: {_words(tally)}. --keep-cut keeps cut answers, and computes nothing"
                " again; for more --max-new-tokens choose another --out"
            )
    return {
        "answers": written,
        "images": references.root,
        **{kind: tally.counts.get(kind, 0) for kind in ("cut", "empty", "unusable", "other_tokens")},
        **{f"{kind}_samples": tally.named.get(kind, []) for kind in ("cut", "empty", "unusable", "other_tokens")},
        "tokens": tally.counts.get("tokens", 0),
        "rejected": rejects.count,
        "rejected_samples": rejects.reasons,
    }


def _records(
    config: AnswerConfig,
    samples: Samples,
    first: int,
    index: int,
    parts: AnswerParts,
    provenance: Mapping[str, Any],
    references: ImageReferences,
    tally: Tally,
) -> Iterator[dict[str, Any]]:
    if not parts.is_answered(first):
        return
    sample = samples[index]
    for number in range(config.n):
        answer, name = parts.answer(first, number), sample.id or sample.key
        name += f"#{number + 1}" if config.n > 1 else ""
        if not answer.finished:
            tally.add("cut", name)
            if not config.keep_cut:
                continue
        if not answer.text:
            tally.add("empty", name)
            continue
        try:
            if answer.fault:
                raise SampleError(answer.fault)
            record = record_of(sample, answer, references.of(sample), provenance, several=config.n > 1)
        except SampleError as error:
            tally.add("unusable", f"{name}: {error}")
            continue
        if not answer.same_tokens:
            tally.add("other_tokens", name)
        tally.counts["tokens"] = tally.counts.get("tokens", 0) + answer.tokens
        yield record


def _name(samples: Samples, index: int) -> str:
    return samples[index].id or samples.key(index)


def _words(tally: Tally) -> str:
    words = {"cut": "cut at --max-new-tokens", "empty": "empty", "unusable": "unusable"}
    return (
        ", ".join(f"{tally.counts[kind]:,} {text}" for kind, text in words.items() if kind in tally.counts) or "none is there"
    )


@contextmanager
def _replaced(path: Path) -> Iterator[TextIO]:
    """A text file that takes its place when the block ends, and leaves nothing where it fails."""
    part = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
    with explained_write_faults(path.parent, path.name, again=AGAIN):
        try:
            with part.open("w", encoding="utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
