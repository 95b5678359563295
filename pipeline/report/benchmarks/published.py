"""Published figures of MobileVLM, and what a run must be so that it may stand beside them."""

from collections.abc import Mapping
from dataclasses import dataclass

from alignkd.pipeline.evaluate.benchmarks.registry import SIX
from alignkd.pipeline.report.benchmarks.formulas import question_of
from alignkd.pipeline.report.benchmarks.out_folders import Result


@dataclass(frozen=True)
class Published:
    """One model as its paper reports it; ``scores`` in the order of the six benchmarks."""

    name: str
    source: str
    scores: Mapping[str, float]
    average: float


_V1 = "MobileVLM, arXiv:2312.16886"
_V2 = "MobileVLM V2, arXiv:2402.03766"


def _row(name: str, source: str, *figures: float) -> Published:
    *scores, average = figures
    return Published(name, source, dict(zip(SIX, scores, strict=True)), average)


PUBLISHED = (
    _row("MobileVLM 1.7B", _V1, 56.1, 57.3, 41.5, 1196.2, 53.2, 84.5, 58.7),
    _row("MobileVLM 3B", _V1, 59.0, 61.2, 47.5, 1288.9, 59.6, 84.9, 62.8),
    _row("MobileVLM V2 1.7B", _V2, 59.3, 66.7, 52.1, 1302.8, 57.7, 84.3, 64.2),
    _row("MobileVLM V2 3B", _V2, 61.1, 70.0, 57.5, 1440.5, 63.2, 84.7, 68.1),
    _row("MobileVLM V2 7B", _V2, 62.6, 74.8, 62.3, 1560.7, 69.2, 85.3, 72.1),
)

_OFFICIAL = {"gqa": 12_578, "sqa": 2_017, "textvqa": 5_000, "mme": 2_374, "mmbench": 1_164, "pope": 8_910}
"""Questions that count."""


def why_not_comparable(result: Result) -> str:
    """Why a result may not stand beside published ones; empty if it may."""
    if result.limit is not None:
        return "a limited run"
    if result.protocol != "mobilevlm":
        return f"protocol {result.protocol}"
    counted = [line for line in result.lines if line.counted]
    found = len({question_of(line) for line in counted}) if result.benchmark == "mmbench" else len(counted)
    if found != (official := _OFFICIAL.get(result.benchmark)):
        return f"{found:,} questions, not the official {official:,}" if official else "no published figure"
    if result.benchmark == "textvqa" and result.settings.get("ocr_tokens") is not True:
        return "prompts without OCR tokens"
    return ""
