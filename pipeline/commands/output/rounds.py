"""The figures of ``alignkd rounds`` as text for people."""

from collections.abc import Mapping
from typing import Any


def rounds_text(figures: Mapping[str, Any]) -> str:
    """One line a round, and what to do next."""
    lines = [
        f"round {one['round']}: {one['answers']:,} answers of the student, {one['steps']:,} steps, loss {one['loss']:.4g}"
        for one in figures["rounds"]
    ]
    return "\n".join([*lines, f"student: {figures['student']}", f"next: alignkd chat {figures['student']} --image FILE"])
