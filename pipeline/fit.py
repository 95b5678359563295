"""Whether a cache, a recipe and an earlier run fit what stage two is asked to do: refused with both values and the way out."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignkd.models.vlm import Vlm
from alignkd.recipes import Recipe


def check_fit(student: Vlm, found: Mapping[str, Any], template: str, max_length: int, cache: str) -> None:
    """Refuse a cache that this student, template or maximum length does not fit. ``found``: its fingerprint.

    Raises:
        ValueError: names what differs, both values and the way out.
    """
    pairs = {
        "template": (found["template"], template),
        "maximum length": (found["max_length"], max_length),
        **_pairs(student, found),
    }
    differing = _differing(pairs, "in the cache")
    if differing:
        raise ValueError(
            f"the cache {cache} does not fit: {differing}. Use a student and settings that match the teacher's, or write"
            " another cache with alignkd cache-teacher"
        )


def check_teacher(student: Vlm, teacher: Vlm) -> None:
    """Refuse a teacher in the loop whose targets this student cannot be compared with.

    Raises:
        ValueError: names what differs, and both values.
    """
    differing = _differing(_pairs(student, describe(teacher)), "of the teacher")
    if differing:
        raise ValueError(f"--online-teacher {teacher.folder} does not fit: {differing}. Use a pair that matches")


def describe(teacher: Vlm) -> dict[str, Any]:
    """What of a teacher decides whether a student fits it, as in a cache's fingerprint."""
    return {
        "teacher": {"vocabulary": teacher.vocabulary, "heads": teacher.heads, "width": teacher.hidden_size},
        "vision_tokens_per_image": teacher.vision_tokens_per_image,
        "tokenizer": teacher.tokenizer_fingerprint(),
        "image_preprocessing": teacher.image_fingerprint(),
    }


def _pairs(student: Vlm, found: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {
        "vocabulary": (found["teacher"]["vocabulary"], student.vocabulary),
        "vision tokens an image": (found["vision_tokens_per_image"], student.vision_tokens_per_image),
        "tokenizer": (found["tokenizer"][:12], student.tokenizer_fingerprint()[:12]),
        "image preprocessing": (found["image_preprocessing"][:12], student.image_fingerprint()[:12]),
    }


def _differing(pairs: Mapping[str, tuple[Any, Any]], where: str) -> str:
    return "; ".join(f"{name}: {was} {where}, {now} here" for name, (was, now) in pairs.items() if was != now)


def check_targets(found: Mapping[str, Any], recipe: Recipe) -> None:
    """Refuse a recipe whose targets the cache lacks, or logits cached at another temperature.

    Raises:
        ValueError: names the target, and the way out.
    """
    held = found["targets"]
    lacking = sorted(name for name in recipe.needs if not held[name])
    if lacking:
        raise ValueError(
            f"recipe {recipe.name!r} needs {', '.join(lacking)}, which the cache does not hold; choose another --recipe,"
            f" or cache with --targets {','.join(sorted(recipe.needs))}"
        )
    # Hidden states serve any temperature: theirs is None.
    if "logits" in recipe.needs and held["logits"]["temperature"] not in (None, recipe.temperature):
        raise ValueError(
            f"the cache holds logits at temperature {held['logits']['temperature']}, the recipe wants"
            f" {recipe.temperature}: such targets of one temperature do not serve another; use --set"
            f" temperature={held['logits']['temperature']} or cache with --temperature {recipe.temperature}"
        )


def check_out(out: Path, *, resume: bool) -> None:
    """Refuse to write over a run.

    Raises:
        ValueError: there is one.
    """
    if not resume and (out / "metrics.jsonl").exists():
        raise ValueError(f"--out {out} already holds a run; go on with --resume, or choose another folder")


_MAY_CHANGE = (
    *("resume", "device", "workers", "save_steps", "save_total_limit", "log_steps", "max_rejected", "out", "images", "data"),
    *("cache", "report_to", "term_gradients", "feature_bytes", "batch_size", "gradient_accumulation", "batch_tokens"),
)
"""What a resumed run may be given anew: nothing that changes what is learned. Data and cache are compared by content, and
batches by what a step takes."""


def check_same_run(path: Path, resolved: Mapping[str, Any]) -> None:
    """Refuse to go on with a run of other settings. ``path``: its record; ``resolved``: the configuration now.

    Raises:
        ValueError: names each setting that differs, with both values.
    """
    if not path.is_file():
        return
    before = json.loads(path.read_text())["configuration"]
    now = json.loads(json.dumps(resolved, default=str))
    differing = [
        f"{name}: {before.get(name)!r} before, {value!r} now"
        for name, value in now.items()
        if name not in _MAY_CHANGE and before.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"--resume: {path.parent} was run with other settings: {'; '.join(differing)}. Resume with the same ones, or"
            " choose another --out"
        )
