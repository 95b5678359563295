"""Settings of the ``alignkd benchmark`` commands."""

from dataclasses import dataclass
from typing import Any

from alignkd.pipeline.config import shared
from alignkd.settings import Settings, setting

PROTOCOLS = ("mobilevlm", "lmms-eval")
"""Whose prompts, numbers of new tokens and scoring are followed: MobileVLM's (LLaVA's, and the official scorers'), or
those of lmms-eval."""


BATCH_TOKENS = 32_768
"""Positions of a batch: about 100 questions of MobileVLM's, for which a model of 1.7 billion weights keeps 6 GB in bfloat16."""


def root() -> Any:
    """The folder of the official files."""
    return setting(
        group="data",
        help="Folder of the official files: one folder a benchmark, as docs/benchmarks.md shows; or the benchmark's own.",
    )


def protocol() -> Any:
    """Whose evaluation is followed."""
    return setting(
        "mobilevlm", group="data", choices=PROTOCOLS, help="Whose prompts and scoring are followed where the tools differ."
    )


@dataclass(frozen=True, kw_only=True)
class BenchmarkScoreConfig(Settings):
    """What ``alignkd benchmark score`` is asked to do."""

    benchmark: str = setting(group="data", help="gqa, sqa, textvqa, mme, mmbench, pope, vqav2 or llava.")
    root: str = root()
    answers: str = setting(group="data", help="Answer file in LLaVA's format: a JSON object with question_id and text a line.")
    protocol: str = protocol()
    out: str | None = setting(None, group="storage", help="Write the result, with a line on each question, to this JSON file.")


@dataclass(frozen=True, kw_only=True)
class BenchmarkRunConfig(Settings):
    """What ``alignkd benchmark run`` is asked to do."""

    model: str = setting(group="model", help="A checkpoint: a folder, or ORG/NAME[@REVISION].")
    benchmark: str = setting(group="data", help="One or more of gqa, sqa, textvqa, mme, mmbench, pope, vqav2, llava: gqa,pope.")
    root: str = root()
    out: str = setting(group="storage", aliases=("output-dir",), help="Folder for answers, results; a rerun continues in it.")
    protocol: str = protocol()
    limit: int | None = setting(
        None, group="data", at_least=1, default_text="all", help="The first questions alone, of each benchmark."
    )
    template: str | None = shared.template()
    prompt_date: str | None = shared.prompt_date()
    batch_tokens: int = setting(
        BATCH_TOKENS, group="model", at_least=1, help="Positions of a batch: its longest question times its questions."
    )
    dtype: str | None = setting(
        None, group="model", choices=shared.DTYPES, default_text="float16 on a GPU, else float32", help="Dtype of the model."
    )
    device: str | None = shared.device()
    vision_tower: str | None = shared.vision_tower()
    download: bool = shared.download()
    plugins: tuple[str, ...] = shared.plugins()
