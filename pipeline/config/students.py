"""The configurations of ``alignkd new-student`` and ``alignkd push``."""

from dataclasses import dataclass

from alignkd.errors import ConfigError
from alignkd.pipeline.config import shared
from alignkd.settings import Settings, setting

PROJECTORS = ("ldpnetv2", "ldpnet")


@dataclass(frozen=True, kw_only=True)
class NewStudentConfig(Settings):
    """What ``alignkd new-student`` is asked to do."""

    language_model: str = setting(group="model", help="A Llama with its tokenizer: a folder, or ORG/NAME[@REVISION].")
    tower: str = setting(
        group="model", help="A CLIP model, of which the vision tower is taken: a folder, or ORG/NAME[@REVISION]."
    )
    projector: str = setting(
        "ldpnetv2",
        group="model",
        choices=PROJECTORS,
        help="ldpnetv2: MobileVLM V2's; ldpnet: MobileVLM's, half of the patches a side.",
    )
    projector_from: str | None = setting(
        None, group="model", metavar="FILE", help="Weights of a projector that was trained before: mm_projector.bin."
    )
    grid: int = setting(12, group="model", at_least=1, at_most=256, help="Side of ldpnetv2's grid of vision tokens.")
    out: str = setting(group="storage", aliases=("output-dir",), help="New folder of the student.")
    dtype: str | None = setting(
        None, group="model", choices=shared.DTYPES, default_text="the language model's", help="Dtype of the weights on disk."
    )
    seed: int = shared.seed("Seed of the projector's weights.")
    download: bool = shared.download()


@dataclass(frozen=True, kw_only=True)
class PushConfig(Settings):
    """What ``alignkd push`` is asked to do. ``run``: folder of a training run; ``repo``: ORG/NAME, None with ``folder``."""

    run: str
    repo: str | None = None
    folder: str | None = setting(
        None, group="storage", metavar="DIR", help="Write student and card to this new folder; nothing leaves the machine."
    )
    best: bool = setting(False, group="model", plain_flag=True, help="The student that --keep-best kept, instead of the last.")
    official: bool = setting(
        False, group="model", plain_flag=True, help="In the layout of the official release, where its family has one."
    )
    benchmarks: tuple[str, ...] = setting(
        (),
        group="evaluation",
        metavar="DIR",
        help="The --out of a benchmark run or an evaluate, whose scores the card shows; may be repeated.",
    )
    license: str | None = setting(
        None,
        group="general",
        metavar="ID",
        default_text="left for you to fill in",
        help="Licence of the student, such as apache-2.0.",
    )
    private: bool = setting(False, group="storage", plain_flag=True, help="Make the repository private, if it is new.")
    revision: str | None = setting(None, group="storage", default_text="main", help="Branch that is pushed to.")

    def check(self) -> None:
        """Refuse a push to nowhere, and layouts that are not kept.

        Raises:
            ConfigError: says which.
        """
        if self.repo is None and self.folder is None:
            raise ConfigError("no REPO is given; give ORG/NAME on the Hugging Face Hub, or --folder DIR to write it there")
        if self.best and self.official:
            raise ConfigError("the best student is kept in Hugging Face form alone; leave out --official, or --best")
