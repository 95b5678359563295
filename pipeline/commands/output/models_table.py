"""Which model families are known, what each supports, and why not. Imports neither torch nor transformers."""

from collections.abc import Mapping, Sequence
from typing import Any

from alignkd.models.registry import REFUSED, FamilyRecord, family_records

OTHERS = (
    "Any other image-text-to-text model of transformers is tried unchanged, and refused with the reason if it is incompatible:"
    " its images must be encoded apart from the text, and its layers attend to them as to text."
)


def list_models() -> list[dict[str, Any]]:
    """One entry a family: its name, and for each feature "yes" or why not; then the refused models."""
    known = [{"family": record.title or record.family, **_supported(record)} for record in family_records()]
    return known + [{"family": model_type, "refused": why} for model_type, why in sorted(REFUSED.items())]


def _supported(record: FamilyRecord) -> dict[str, str]:
    # No family lacks attention or logits: a model without them is refused when it is loaded.
    reasons = {
        "attention": "",
        "slice": record.without_slice,
        "logits": "",
        "several images": record.several_images,
        "other students": record.without_coordinates,
    }
    return {name: "yes" if not why else f"no: {why}" for name, why in reasons.items()}


def models_text(entries: Sequence[Mapping[str, Any]]) -> str:
    """The entries of :func:`list_models` for people: a table, then why not, then what is refused."""
    known, refused = ([entry for entry in entries if ("refused" in entry) == is_refused] for is_refused in (False, True))
    columns = [name for name in known[0] if name != "family"]
    width = max(len(entry["family"]) for entry in known)
    lines = [" ".join([f"{'family':<{width}}", *columns])]
    reasons: dict[str, list[str]] = {}
    for entry in known:
        cells = [entry[name].partition(":")[0].ljust(len(name)) for name in columns]
        lines.append(" ".join([f"{entry['family']:<{width}}", *cells]).rstrip())
        for name in columns:
            if entry[name] != "yes":
                reasons.setdefault(f"{name}, {entry[name]}", []).append(entry["family"])
    for reason, families in reasons.items():
        lines.append("")
        lines.append(f"{reason} ({', '.join(families) if len(families) < len(known) / 2 else 'where it says no'})")
    lines += ["", *(f"refused: {entry['family']}: {entry['refused']}" for entry in refused), "", OTHERS]
    return "\n".join(lines)
