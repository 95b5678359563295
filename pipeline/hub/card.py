"""The model card of a student: what it was trained from, with which settings, and how it scores. Needs no torch.

A card is public, and parts of it come from others: paths are shortened to names, credentials removed, and text means nothing
in Markdown, HTML or YAML.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from alignkd.pipeline.hub.card_text import bullets, cell, short_name, table
from alignkd.pipeline.hub.names import parse_name
from alignkd.pipeline.runtime.printable import printable
from alignkd.pipeline.runtime.redact import redacted, redacted_text

_TAGS = ["alignkd", "knowledge-distillation", "vision-language-model"]
_OWN_CLASSES = ("mobilevlm_v2", "minigpt4")
"""Values of ``model_type`` whose classes alignkd registers with transformers."""
_OFFICIAL = "mobilevlm"
_SETTINGS = (
    *("epochs", "max_steps", "batch_size", "batch_tokens", "gradient_accumulation", "group_by_length", "learning_rate"),
    *(
        "projector_learning_rate",
        "optimizer",
        "muon_learning_rate",
        "warmup",
        "weight_decay",
        "lora",
        "lora_rank",
        "lora_alpha",
    ),
    *("lora_dropout", "seed", "dtype", "template", "max_length", "prompt_date", "deepspeed"),
)
_ONLY_WITH = {
    "muon_learning_rate": ("optimizer", "muon"),
    **dict.fromkeys(("lora_rank", "lora_alpha", "lora_dropout"), ("lora", True)),
}
_VERSIONS = ("alignkd", "python", "torch", "transformers", "accelerate", "device")
_HUB_DATA = re.compile(r"hf://datasets/([A-Za-z0-9][\w.-]*/[\w.-]+)")

_TRUSTED = "not read: vision tokens are the cache's, whose image hashes are trusted"

LICENCE_MISSING = (
    "**The licence is not stated.** It depends on the licences of the language model, the vision tower, the teacher and the"
    " data: add a line `license: ...` to the head of this file."
)


@dataclass(frozen=True)
class CardScore:
    """One score of a card. ``interval``: its 95 % interval, None where there is none; ``of``: the model that was measured."""

    title: str
    score: float
    unit: str
    interval: tuple[float, float] | None
    questions: int
    protocol: str
    of: str = ""


@dataclass(frozen=True)
class Card:
    """What a card is made of. ``record``: ``run.json``. ``result``: ``result.json`` of a run that has ended.

    ``model_type``: of the student's ``config.json``. ``teacher``: its name, None where it is not known. ``best``: the
    figure that chose this student, its value and step, where it is not the last one. ``repo``: where it is published.
    """

    record: Mapping[str, Any]
    model_type: str
    result: Mapping[str, Any] | None = None
    teacher: str | None = None
    best: Mapping[str, Any] | None = None
    scores: Sequence[CardScore] = ()
    repo: str | None = None
    licence: str | None = None

    @property
    def settings(self) -> Mapping[str, Any]:
        """The resolved configuration."""
        found = self.record.get("configuration")
        return found if isinstance(found, Mapping) else {}

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The fields of the recipe."""
        found = self.settings.get("recipe")
        return found if isinstance(found, Mapping) else {}

    def text(self) -> str:
        """The card: a head in YAML, then Markdown."""
        card = Card(**{**vars(self), "record": redacted(self.record), "result": redacted(self.result or {})})
        parts = [card._head(), *card._about(), *card._scores(), *card._training(), *card._loading()]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _head(self) -> str:
        import yaml

        base, student = parse_name(str(self.settings.get("student"))), self.settings.get("student")
        head: dict[str, Any] = {"library_name": "alignkd" if self._needs_alignkd else "transformers"}
        head |= {"pipeline_tag": "image-text-to-text", "tags": _TAGS}
        if base is not None and base.is_pinned:
            head["base_model"] = base.repo
        if data := sorted({found[1] for text in _texts(self.settings.get("data")) if (found := _HUB_DATA.match(text))}):
            head["datasets"] = data
        if self.licence is not None:
            head["license"] = self.licence
        lines = yaml.safe_dump(head, sort_keys=False, allow_unicode=False).rstrip("\n")
        notes = [] if self.licence is not None else ["# license: fill in, such as apache-2.0"]
        if "base_model" not in head and isinstance(student, str):
            notes.append(f"# base_model: fill in ORG/NAME; it was the folder {json.dumps(short_name(student))}")
        return "\n".join(["---", lines, *notes, "---"])

    @property
    def _needs_alignkd(self) -> bool:
        return self.model_type in (*_OWN_CLASSES, _OFFICIAL)

    def _about(self) -> Iterator[str]:
        yield f"# {cell(self.repo.partition('/')[2] if self.repo else short_name(str(self.settings.get('out', 'student'))))}"
        taught = f" from the teacher {cell(self.teacher)}" if self.teacher else ""
        yield (
            f"A vision-language model, trained by knowledge distillation{taught} with"
            f" alignkd, recipe `{_code(self.recipe.get('name', 'unnamed'))}`."
        )
        if self.best is not None:
            yield (
                f"It is the best student of its run by {cell(self.best.get('name'))}: {_number(self.best.get('value'))} at step"
                f" {_number(self.best.get('step'))}."
            )
        if self.licence is None:
            yield LICENCE_MISSING

    def _scores(self) -> Iterator[str]:
        yield "## Scores"
        if not self.scores:
            yield "None were measured when this card was written."
            return
        rows = [
            [score.title, _score(score), _interval(score), f"{score.questions:,}", score.protocol, short_name(score.of)]
            for score in self.scores
        ]
        yield table(["benchmark", "score", "95 % interval", "questions", "protocol", "measured on"], rows)

    def _training(self) -> Iterator[str]:
        yield "## Training"
        result, settings = self.result or {}, self.settings
        prints = _mappings(settings.get("cache_fingerprint"))
        weights = [teacher.get("weights") for one in prints for teacher in _mappings(one.get("teacher"))]
        facts = {
            "student at the start": short_name(str(settings["student"])) if settings.get("student") else None,
            "teacher": self.teacher,
            "teacher's weights, SHA-256": ", ".join(map(str, weights)) or None,
            "cache fingerprint, SHA-256": ", ".join(map(_digest, prints)) or None,
            "data": ", ".join(short_name(text) for text in _texts(settings.get("data"))) or None,
            "weights of the data": settings.get("data_weight") or None,
            "samples": settings.get("samples"),
            "samples' keys, SHA-256": settings.get("data_keys"),
            "images": _TRUSTED if settings.get("vision_input") == "cache" else None,
            "steps": self.best.get("step") if self.best else result.get("steps", settings.get("steps")),
            "samples seen": result.get("samples"),
            "positions (text and vision tokens) seen": result.get("tokens"),
            "rejected samples": result.get("rejected"),
            "loss at the end": result.get("loss"),
        }
        yield bullets({name: _value(value) for name, value in facts.items() if value is not None})
        shown = {name: settings[name] for name in _SETTINGS if self._is_shown(name)}
        if isinstance(shown.get("deepspeed"), str):
            shown["deepspeed"] = short_name(shown["deepspeed"])
        rows = [[name.replace("_", " "), _value(value)] for name, value in shown.items()]
        yield table(["setting", "value"], rows)
        recipe = {name: value for name, value in self.recipe.items() if value not in (0.0, None) and name != "name"}
        yield f"Fields of the recipe `{_code(self.recipe.get('name', 'unnamed'))}`; those that are 0 are left out:"
        yield table(["field", "value"], [[name, _value(value)] for name, value in recipe.items()])
        versions = self.record.get("versions")
        if isinstance(versions, Mapping):
            yield bullets({name: str(versions[name]) for name in _VERSIONS if name in versions})

    def _is_shown(self, name: str) -> bool:
        value = self.settings.get(name)
        other, wanted = _ONLY_WITH.get(name, (name, value))
        return value is not None and value is not False and self.settings.get(other) == wanted

    def _loading(self) -> Iterator[str]:
        where = self.repo or "FOLDER"
        yield "## Use"
        yield f"With alignkd:\n\n```\nalignkd chat {where}{' --download' * bool(self.repo)} --image picture.jpg\n```"
        if self.model_type == _OFFICIAL:
            yield "The files have the layout of the official MobileVLM checkpoints, for programs that read those."
            return
        registers = ["import alignkd.models.loading  # registers the model's class with transformers"] * self._needs_alignkd
        lines = [
            "from transformers import AutoModelForImageTextToText",
            "",
            f'model = AutoModelForImageTextToText.from_pretrained("{where}")',
        ]
        yield "\n".join(["```python", *registers, *lines, "```"])


def _texts(value: Any) -> Iterable[str]:
    """The texts of a setting that holds one, several, or none."""
    if isinstance(value, str):
        return [value]
    return [text for text in value if isinstance(text, str)] if isinstance(value, Sequence) else []


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    """The mappings of a field that holds one, several, or none: those of one cache or of several."""
    return [one for one in (value if isinstance(value, list | tuple) else [value]) if isinstance(one, Mapping)]


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return _number(value)
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value, default=str)
    return str(value)


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return cell(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def _score(score: CardScore) -> str:
    return f"{score.score:,.1f} %" if score.unit == "percent" else f"{score.score:,.1f} {score.unit}"


def _interval(score: CardScore) -> str:
    return "none" if score.interval is None else f"{score.interval[0]:,.1f} to {score.interval[1]:,.1f}"


def _code(value: object) -> str:
    return printable(redacted_text(PurePosixPath(str(value)).name.replace("`", "'")[:100]))
