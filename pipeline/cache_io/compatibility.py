"""Whether a cache or an online teacher is compatible with a student and a recipe.

Every refusal names what differs, both values, and what to do.
"""

from collections.abc import Collection, Mapping, Sequence, Set
from typing import Any

from alignkd.capture.layer_pairs import compared_layers, needed_layers
from alignkd.errors import CacheError, ConfigError
from alignkd.losses.recipes import Recipe
from alignkd.models.encoders.version import ENCODER_VERSION, changes_since, encoder_version
from alignkd.models.vlm import Vlm
from alignkd.pipeline.cache_io.cross_model import CrossModelMap
from alignkd.pipeline.cache_io.teacher_fingerprint import model_fingerprint
from alignkd.pipeline.config.cache_layout import logit_width
from alignkd.pipeline.config.fingerprint_keys import check_fingerprint_keys

VISUAL = frozenset({"attention", "vision"})
ALL = VISUAL | {"logits"}


def check_student_compatible(
    student: Vlm,
    fingerprint: Mapping[str, Any],
    template: str,
    max_length: int,
    cache: str,
    *,
    needs: Set[str] = ALL,
    fields: Collection[str] = (),
) -> CrossModelMap | None:
    """Refuse a cache that is incompatible with this student, template or maximum length.

    Returns None where teacher and student have the same architecture, tokenizer and preprocessing: cached rows are then used
    unchanged. Otherwise returns the map from the teacher's tokens to the student's. It needs rows that hold the coordinates
    of vision tokens and the characters of token ids (``fields``: those of the cache). Logits also need the teacher's tokenizer,
    or its first ids where the cache keeps the distribution over those.

    Raises:
        CacheError: names what differs, both values, and what to do.
    """
    check_fingerprint_keys(fingerprint, cache=cache)
    if needs:
        check_encoder(fingerprint, student.family, cache)
    mismatch = _differences(_model_pairs(student, template, fingerprint), "in the cache")
    if mismatch and needs:
        prefix = f"the teacher of the cache {cache} does not match the student ({mismatch})"
        _check_cross_model(student, fingerprint, needs, fields, prefix)
        return CrossModelMap.of(student, fingerprint)
    width = logit_width(fingerprint) if "logits" in needs else fingerprint["teacher"]["vocabulary"]
    settings = {
        "template": (fingerprint["template"], template),
        "maximum length": (fingerprint["max_length"], max_length),
        "vocabulary": (width, student.vocabulary),
    }
    # A recipe without teacher targets reads no row: a teacher that does not match is then no reason to refuse.
    if not mismatch and (differences := _differences(settings, "in the cache")):
        hint = _vocabulary_hint(student, fingerprint) if "logits" in needs else ""
        raise CacheError(
            f"the cache {cache} is incompatible with this run: {differences}. Use a student and settings that match the"
            f" teacher's, or write another cache with alignkd cache-teacher{hint and f'; {hint}'}"
        )
    return None


def check_encoder(fingerprint: Mapping[str, Any], family: str, cache: str) -> None:
    """Refuse a cache whose samples had other ids, labels or pixel values than this version gives them.

    ``family``: the teacher's where the fingerprint does not say it.

    Raises:
        CacheError: says what changed, and what to do.
    """
    version, template = fingerprint.get("encoder", 1), fingerprint["template"]
    family = fingerprint["teacher"].get("family", family)
    if version > ENCODER_VERSION or version > encoder_version(family, template):
        raise CacheError(
            f"the cache {cache} was written by a later version of alignkd, which encodes samples in another way (version"
            f" {version} of its encoders; this one has {encoder_version(family, template)} for them): train with that version"
        )
    if reasons := changes_since(version, family, template):
        raise CacheError(
            f"the cache {cache} was written by an earlier version of alignkd, whose ids, labels or pixel values differ"
            f" from today's: since then {'; '.join(reasons)}. Its targets belong to other inputs than the student would see:"
            " write another cache with alignkd cache-teacher, or train with the version that wrote it (cache inspect and"
            " cache verify read it as before)"
        )


def has_rows_of_student(student: Vlm, fingerprint: Mapping[str, Any], template: str, max_length: int) -> bool:
    """Whether the token ids in a cache's rows are those that this student's own samples have."""
    settings = fingerprint["template"], fingerprint["max_length"]
    if settings != (template, max_length) or changes_since(fingerprint.get("encoder", 1), student.family, template):
        return False
    return not _differences(_model_pairs(student, template, fingerprint), "")


def _check_cross_model(
    student: Vlm, fingerprint: Mapping[str, Any], needs: Set[str], fields: Collection[str], prefix: str
) -> None:
    """Refuse a cross-architecture cache whose targets cannot be mapped to the student. ``prefix`` begins the message."""
    if fingerprint.get("alignment") == "slice":
        raise CacheError(
            f"{prefix}, and it holds a slice of the teacher, which only a student with the teacher's architecture, tokenizer"
            " and preprocessing can use: write another cache with --alignment targets"
        )
    lacking = sorted(({"spans"} | ({"regions"} if needs & VISUAL else set())) - set(fields))
    if lacking:
        raise CacheError(
            f"{prefix}, and its rows lack {' and '.join(lacking)}, which map the teacher's tokens to the student's: write"
            " another cache with alignkd cache-teacher"
        )
    without_coordinates = student.without_coordinates or fingerprint["teacher"].get("no_place", "")
    counts = fingerprint.get("vision_tokens_per_image"), student.vision_tokens_per_image
    if needs & VISUAL and without_coordinates and (None in counts or counts[0] != counts[1]):
        raise CacheError(
            f"{prefix}, and the vision tokens of one of the two have no coordinates, so they cannot be mapped:"
            f" {without_coordinates}. Use teacher and student of one model family, or a recipe without attention and vision"
        )
    if "logits" in needs and (differences := _differences(_vocabulary_pairs(student, fingerprint), "in the cache")):
        hint = _vocabulary_hint(student, fingerprint)
        raise CacheError(
            f"{prefix}, and logits need the same tokenizer and output head width: {differences}. Train without logits"
            " (--set reverse_kl=0 --set forward_kl=0 --set jensen_shannon=0): attention and vision tokens work"
            f" across tokenizers. Or choose teacher and student with the same tokenizer{hint and f'; {hint}'}"
        )


def _vocabulary_pairs(student: Vlm, fingerprint: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What must be equal so that the teacher's logits are about the student's tokens: (of the cache, of the student)."""
    width = logit_width(fingerprint)
    if "tokenizer_first_ids" in fingerprint:
        name, cached = f"tokenizer's first {width} ids", fingerprint["tokenizer_first_ids"]
        own = student.tokenizer_fingerprint(width)
    else:
        name, cached, own = "tokenizer", fingerprint["tokenizer"], student.tokenizer_fingerprint()
    return {name: (_short(cached), _short(own)), "vocabulary": (width, student.vocabulary)}


def _vocabulary_hint(student: Vlm, fingerprint: Mapping[str, Any]) -> str:
    """How to cache logits for this student, where its vocabulary may be the beginning of the teacher's; else empty."""
    size = student.vocabulary
    if size == logit_width(fingerprint) or size > fingerprint["teacher"]["vocabulary"]:
        return ""
    if fingerprint["tokenizer"] == student.tokenizer_fingerprint():
        return f"cache with --logit-vocabulary {size} to keep the student's share of the teacher's logits"
    return (
        f"if the student's vocabulary is the first {size} tokens of the teacher's, cache with --logit-vocabulary {size},"
        " which keeps the distribution over those"
    )


def check_online_teacher(student: Vlm, teacher: Vlm, template: str) -> None:
    """Refuse an online teacher that cannot run on the student's own batches.

    Raises:
        ConfigError: names what differs, both values, and what to do.
    """
    pairs = {
        **_model_pairs(student, template, model_fingerprint(teacher, template)),
        "vocabulary": (teacher.vocabulary, student.vocabulary),
    }
    if differences := _differences(pairs, "of the teacher"):
        size = student.vocabulary
        is_prefix = size < teacher.vocabulary and teacher.tokenizer_fingerprint(size) == student.tokenizer_fingerprint(size)
        option = f" --logit-vocabulary {size}" if is_prefix else ""
        raise ConfigError(
            f"--online-teacher {teacher.folder} is incompatible with the student: {differences}. An online teacher runs on the"
            " student's own batches: use a pair of one architecture, tokenizer and preprocessing, or cache it first (alignkd"
            f" cache-teacher{option}), which also serves students of other architectures"
        )


def _model_pairs(student: Vlm, template: str, fingerprint: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What must be equal so that the teacher's rows serve the student unchanged: (of the teacher, of the student).

    The name of the template is compared only where the student does not know it. Where it does, another template is a choice of
    the user, which :func:`check_student_compatible` refuses as such.
    """
    own = model_fingerprint(student, template)
    keys = {
        "vision tokens an image": "vision_tokens_per_image",
        "tokenizer": "tokenizer",
        "image preprocessing": "image_preprocessing",
        "chat template": "chat_template",
    }
    pairs = {name: (_short(fingerprint.get(key)), _short(own.get(key))) for name, key in keys.items()}
    family = own["teacher"]["family"]
    unknown = {} if fingerprint["template"] in student.templates else {"template": (fingerprint["template"], template)}
    return {"family": (fingerprint["teacher"].get("family", family), family), **unknown, **pairs}


def _short(value: Any) -> Any:
    return value[:12] if isinstance(value, str) else value


def _differences(pairs: Mapping[str, tuple[Any, Any]], where: str) -> str:
    return "; ".join(f"{name}: {first} {where}, {second} here" for name, (first, second) in pairs.items() if first != second)


def check_recipe_targets(fingerprint: Mapping[str, Any], recipe: Recipe) -> None:
    """Refuse a recipe whose targets the cache lacks, or logits that were cached at another temperature.

    Raises:
        CacheError: names the target, and what to do.
    """
    check_fingerprint_keys(fingerprint)
    targets = fingerprint["targets"]
    lacking = sorted(name for name in recipe.needs if not targets.get(name))
    if lacking:
        raise CacheError(
            f"recipe {recipe.name!r} needs {', '.join(lacking)}, which the cache does not hold; choose another --recipe,"
            f" or cache with --targets {','.join(sorted(recipe.needs))}"
        )
    # Hidden states serve any temperature: their fingerprint has none.
    temperature = targets["logits"].get("temperature") if "logits" in recipe.needs else None
    if temperature not in (None, recipe.temperature):
        raise CacheError(
            f"the cache holds logits at temperature {temperature}, but recipe {recipe.name!r} has temperature"
            f" {recipe.temperature}, and logits of this kind serve one temperature only: use --set"
            f" temperature={temperature}, or cache with --temperature {recipe.temperature} (or with --logits hidden, which"
            " serves any)"
        )


def check_attention_layers(student: Vlm, fingerprint: Mapping[str, Any], recipe: Recipe) -> int | None:
    """Refuse a recipe that compares layers whose attention the cache lacks; the number of the teacher's layers.

    None where the fingerprint does not say it: the cache then holds the first layer only.

    Raises:
        CacheError: names the layers needed and held, and what to do.
    """
    check_fingerprint_keys(fingerprint, "targets")
    cached = fingerprint["targets"].get("attention_layers", {})
    held, teacher_layers = cached.get("held", [0]), cached.get("of")
    layers = compared_layers(recipe, student)
    known = teacher_layers is not None or not any(layers)
    if known and set(needed_layers(recipe, student, teacher_layers)) <= set(held):
        return teacher_layers  # type: ignore[no-any-return]
    if not any(layers):
        raise CacheError(
            f"recipe {recipe.name!r} needs the attention of the teacher's first layer, but the cache holds layers"
            f" {_listed(held)} only: cache with 0 among --attention-layers, or use --set vision_focus=0 --set attention=0"
        )
    sliced = fingerprint.get("alignment") == "slice"
    needs_targets = " and --alignment targets, as a slice gives the first layer only" if sliced else ""
    raise CacheError(
        f"recipe {recipe.name!r} compares the student's layers {_listed(layers)} of {student.layers} with the teacher's layers"
        f" at the same relative depth, but the cache holds the attention of the teacher's layers {_listed(held)} only; use"
        f" --set attention_layers=first, or cache with --attention-layers {recipe.attention_layers}@{student.layers}"
        f"{needs_targets}"
    )


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers)) or "none"
