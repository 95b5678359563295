"""The figures of ``alignkd answer`` as text for people."""

from collections.abc import Mapping
from typing import Any

_LEFT_OUT = {
    "empty": "empty, and left out",
    "unusable": "of no use, and left out",
    "other_tokens": "whose text a student learns as other tokens than were written",
}
_NAMED = 3


def answers_text(figures: Mapping[str, Any]) -> str:
    """What was written, and what of it a user should know."""
    if not figures["complete"]:
        return f"this process is done; {figures['left']:,} samples are left to others"
    lines = [f"{figures['answers']:,} answers, {figures['tokens']:,} tokens, to {figures['out']}"]
    if figures["images"]:
        lines.append(f"  their images: --images {figures['images']}")
    cut = "cut at --max-new-tokens, and kept" if figures["keep_cut"] else "cut at --max-new-tokens, and left out"
    for kind, words in {"cut": cut, **_LEFT_OUT}.items():
        if figures[kind]:
            named = ", ".join(figures[f"{kind}_samples"][:_NAMED]) + (", ..." if figures[kind] > _NAMED else "")
            lines.append(f"  {figures[kind]:,} {words}: {named}")
    if figures["rejected"]:
        first = "; ".join(f"{name}: {why}" for name, why in list(figures["rejected_samples"].items())[:_NAMED])
        lines.append(f"  {figures['rejected']:,} samples rejected: {first}")
    return "\n".join(lines)
