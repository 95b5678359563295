"""Which families of models are known, what each supports, and why not."""

from collections.abc import Mapping, Sequence
from typing import Any

from alignkd.models.families import FAMILIES, REFUSED, family_class
from alignkd.models.families.minigpt4 import MiniGpt4Family
from alignkd.models.families.mobilevlm import MobileVlmFamily
from alignkd.models.vlm import Vlm

OTHERS = (
    "Any other image-text-to-text model of transformers is tried as it is, and refused by name where it does not fit: its"
    " images must be encoded apart from the text, and its layers attend to them as to text."
)


def list_models() -> list[dict[str, Any]]:
    """One record a family: its ``model_type``, and for each target "yes" or why not."""
    classes: dict[str, type[Vlm]] = {"mobilevlm (V1, V2)": MobileVlmFamily, "minigpt4": MiniGpt4Family}
    classes |= {kind: family_class(kind) for kind in sorted(FAMILIES)}
    known = [{"family": kind, **_supported(found)} for kind, found in classes.items()]
    return known + [{"family": kind, "refused": why} for kind, why in sorted(REFUSED.items())]


def _supported(family: type[Vlm]) -> dict[str, str]:
    # Attention and logits are what the contract cannot do without: a model lacking them is refused when it is loaded.
    reasons = {
        "attention": "",
        "slice": family.without_slice,
        "logits": "",
        "several images": family.one_image,
        "other students": family.without_coordinates,
    }
    return {name: "yes" if not why else f"no: {why}" for name, why in reasons.items()}


def models_text(records: Sequence[Mapping[str, Any]]) -> str:
    """The records of :func:`list_models` for people: a table, then why not, then what is refused."""
    known, refused = ([record for record in records if ("refused" in record) == is_refused] for is_refused in (False, True))
    columns = [name for name in known[0] if name != "family"]
    width = max(len(record["family"]) for record in known)
    lines = [" ".join([f"{'family':<{width}}", *columns])]
    reasons: dict[str, list[str]] = {}
    for record in known:
        cells = [record[name].partition(":")[0].ljust(len(name)) for name in columns]
        lines.append(" ".join([f"{record['family']:<{width}}", *cells]).rstrip())
        for name in columns:
            if record[name] != "yes":
                reasons.setdefault(f"{name}, {record[name]}", []).append(record["family"])
    for reason, families in reasons.items():
        lines.append("")
        lines.append(f"{reason} ({', '.join(families) if len(families) < len(known) / 2 else 'where it says no'})")
    lines += ["", *(f"refused: {record['family']}: {record['refused']}" for record in refused), "", OTHERS]
    return "\n".join(lines)
