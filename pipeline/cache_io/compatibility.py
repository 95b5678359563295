"""Whether a cache, a recipe and an earlier run fit what stage two is asked to do: refused with both values and the way out."""

from collections.abc import Collection, Mapping, Sequence, Set
from typing import Any

from alignkd.capture.layer_pairs import compared_layers, needed_layers
from alignkd.losses.recipes import Recipe
from alignkd.models.vlm import Vlm
from alignkd.pipeline.cache_io.cross_model import CrossModelMap
from alignkd.pipeline.cache_io.teacher_fingerprint import describe_teacher
from alignkd.pipeline.config.cache_layout import logit_width

VISUAL = frozenset({"attention", "vision"})
ALL = VISUAL | {"logits"}


def check_student_matches(
    student: Vlm,
    found: Mapping[str, Any],
    template: str,
    max_length: int,
    cache: str,
    *,
    needs: Set[str] = ALL,
    fields: Collection[str] = (),
) -> CrossModelMap | None:
    """Refuse a cache that this student, template or maximum length does not fit. ``found``: its fingerprint.

    A student of the teacher's make meets its rows as they are: None. One of another make needs rows that say where their vision
    tokens lie and which characters their ids cover (``fields`` of the cache), and for logits the teacher's tokenizer, or its
    first ids where the cache keeps the distribution over those.

    Raises:
        ValueError: names what differs, both values and the way out.
    """
    make = _differing(_make(student, template, found), "in the cache")
    if not make or not needs:
        settings = {
            "template": (found["template"], template),
            "maximum length": (found["max_length"], max_length),
            "vocabulary": (logit_width(found) if "logits" in needs else found["teacher"]["vocabulary"], student.vocabulary),
        }
        differing = "" if make else _differing(settings, "in the cache")
        if differing:
            shorter = _first_ids(student, found) if "logits" in needs else ""
            raise ValueError(
                f"the cache {cache} does not fit: {differing}. Use a student and settings that match the teacher's, or write"
                f" another cache with alignkd cache-teacher{shorter and f'; {shorter}'}"
            )
        return None
    _check_across(student, found, needs, fields, f"the cache {cache} is of another make than the student ({make})")
    return CrossModelMap.of(student, found)


def _check_across(student: Vlm, found: Mapping[str, Any], needs: Set[str], fields: Collection[str], differs: str) -> None:
    if found.get("alignment") == "slice":
        raise ValueError(
            f"{differs}, and holds a slice of the teacher, which serves students of the teacher's make alone: cache with"
            " --alignment targets"
        )
    lacking = {"spans"} | ({"regions"} if needs & VISUAL else set())
    if not lacking <= set(fields):
        raise ValueError(
            f"{differs}, and its rows do not say where their tokens lie and which characters they cover: write another cache"
            " with alignkd cache-teacher"
        )
    teacher = found["teacher"]
    if needs & VISUAL and (why := student.without_coordinates or teacher.get("no_place", "")):
        tokens = found["vision_tokens_per_image"], student.vision_tokens_per_image
        if None in tokens or tokens[0] != tokens[1]:
            raise ValueError(
                f"{differs}, and the vision tokens of one of them cannot be matched: {why}. Use a pair of one family, or a"
                " recipe without attention and vision"
            )
    if "logits" in needs and (differing := _differing(_vocabularies(student, found), "in the cache")):
        shorter = _first_ids(student, found)
        raise ValueError(
            f"{differs}, and logits need one tokenizer and one width of the output head: {differing}. Leave the logits out"
            " (--set reverse_kl=0, forward_kl=0, jensen_shannon=0, as the recipe has them): attention and vision tokens can"
            f" be used; or choose a pair with one tokenizer{shorter and f'; {shorter}'}"
        )


def _vocabularies(student: Vlm, found: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What teacher and student must share for one's logits to be about the other's tokens."""
    width = logit_width(found)
    if "tokenizer_first_ids" in found:
        tokenizers = found["tokenizer_first_ids"], student.tokenizer_fingerprint(width)
    else:
        tokenizers = found["tokenizer"], student.tokenizer_fingerprint()
    name = f"tokenizer's first {width} ids" if "tokenizer_first_ids" in found else "tokenizer"
    return {name: (_short(tokenizers[0]), _short(tokenizers[1])), "vocabulary": (width, student.vocabulary)}


def _first_ids(student: Vlm, found: Mapping[str, Any]) -> str:
    """The way out where the teacher may have all tokens of the student and more; empty where it cannot have them."""
    wanted = student.vocabulary
    if wanted == logit_width(found) or wanted > found["teacher"]["vocabulary"]:
        return ""
    if found["tokenizer"] == student.tokenizer_fingerprint():
        return f"cache with --logit-vocabulary {wanted} to keep the student's share of the teacher's logits"
    return (
        f"if the student's vocabulary is the first {wanted} tokens of the teacher's, cache with --logit-vocabulary {wanted},"
        " which keeps the distribution over those"
    )


def check_teacher(student: Vlm, teacher: Vlm, template: str) -> None:
    """Refuse a teacher in the loop whose targets this student cannot be compared with batch by batch.

    Raises:
        ValueError: names what differs, and both values.
    """
    pairs = {
        **_make(student, template, describe_teacher(teacher, template)),
        "vocabulary": (teacher.vocabulary, student.vocabulary),
    }
    if differing := _differing(pairs, "of the teacher"):
        wanted = student.vocabulary
        extends = wanted < teacher.vocabulary and teacher.tokenizer_fingerprint(wanted) == student.tokenizer_fingerprint(wanted)
        option = f" --logit-vocabulary {wanted}" if extends else ""
        raise ValueError(
            f"--online-teacher {teacher.folder} does not fit: {differing}. A teacher in the loop reads the student's own"
            f" batches: use a pair that matches, or cache it first (alignkd cache-teacher{option}), which serves other makes"
        )


def _make(student: Vlm, template: str, found: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What teacher and student must share for one's rows to be about the other's tokens as they are.

    Not the template's name where the student knows it: another one is then a choice, and refused.
    """
    own = describe_teacher(student, template)
    names = {
        "vision tokens an image": "vision_tokens_per_image",
        "tokenizer": "tokenizer",
        "image preprocessing": "image_preprocessing",
        "chat template": "chat_template",
    }
    pairs = {name: (_short(found.get(key)), _short(own.get(key))) for name, key in names.items()}
    family = found["teacher"].get("family", own["teacher"]["family"])
    unknown = {} if found["template"] in student.templates else {"template": (found["template"], template)}
    return {"family": (family, own["teacher"]["family"]), **unknown, **pairs}


def _short(value: Any) -> Any:
    return value[:12] if isinstance(value, str) else value


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


def check_attention_layers(student: Vlm, found: Mapping[str, Any], recipe: Recipe) -> int | None:
    """Refuse a recipe that compares layers whose attention the cache lacks; how many layers the teacher has.

    A cache of the first layer alone does not tell: None. ``found``: the cache's fingerprint.

    Raises:
        ValueError: names the layers wanted and held, and the way out.
    """
    about = found["targets"].get("attention_layers", {"held": [0], "of": None})
    held, teacher_layers, layers = about["held"], about["of"], compared_layers(recipe, student)
    known = teacher_layers is not None or not any(layers)
    if known and set(needed_layers(recipe, student, teacher_layers)) <= set(held):
        return teacher_layers  # type: ignore[no-any-return]
    if not any(layers):
        raise ValueError(
            f"recipe {recipe.name!r} needs the attention of the teacher's first layer, but the cache holds layers"
            f" {_listed(held)} alone: cache with 0 among --attention-layers, or use --set vision_focus=0 --set attention=0"
        )
    slice_too = " and --alignment targets, as a slice gives the first layer alone" if found["alignment"] == "slice" else ""
    raise ValueError(
        f"recipe {recipe.name!r} compares attention of the student's layers {_listed(layers)} of {student.layers} with the"
        f" teacher's at the same relative depth, and the cache holds the teacher's layers {_listed(held)} alone; use --set"
        f" attention_layers=first, or cache with --attention-layers {recipe.attention_layers}@{student.layers}{slice_too}"
    )


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers)) or "none"
