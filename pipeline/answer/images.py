"""The image references of written data, so that one ``--images`` serves them all.

References stay as they are where all images lie in one folder. Images that a data file holds itself are written beside the
answers, ``FILE.images/SHA256.png``; where images lie in several folders, references are relative to the folder above them.
"""

import hashlib
import io
import os
import secrets
from pathlib import Path

from PIL import Image

from alignkd.errors import ConfigError
from alignkd.pipeline.config.answer import AnswerConfig
from alignkd.pipeline.data.contract import Samples
from alignkd.pipeline.data.images.places import HELD, read_place
from alignkd.pipeline.data.open_samples import sources_of
from alignkd.pipeline.data.readers import json_file
from alignkd.pipeline.data.readers.registry import reader_of
from alignkd.pipeline.data.sample import Sample
from alignkd.pipeline.evaluate.running.part_lines import AGAIN
from alignkd.pipeline.runtime.out_folder.write_faults import explained_write_faults


class ImageReferences:
    """References of the images of some samples in the data file that answers are written to.

    ``root``: the ``--images`` that they are relative to; None where they have none. Where references do not stay as they are,
    all samples are read once, to know where their images lie.

    Raises:
        ConfigError: some images are at URLs and others are elsewhere, so that no folder is above them all.
    """

    def __init__(self, config: AnswerConfig, samples: Samples) -> None:
        self.folder = Path(f"{config.out}.images")
        sources = sources_of(config)
        roots = list(dict.fromkeys(source.images for source in sources))
        self.root: str | None = roots[0]
        self.unchanged = len(roots) == 1
        if self.unchanged and all(reader_of(source) is json_file for source in sources):
            return
        folders, held, remote = set[str](), False, False
        for index in range(len(samples)):
            for place in samples[index].places:
                here = os.path.isabs(place)
                folders |= {os.path.dirname(place)} if here else set()
                held, remote = held or place.startswith(HELD), remote or "://" in place
        self.unchanged = self.unchanged and not held
        if self.unchanged:
            return
        if remote:
            raise ConfigError(
                f"the images of {config.data_words} lie at URLs and elsewhere, so that no one --images serves the answers in"
                f" {config.out}: answer data whose images lie in one place, each to a file of its own"
            )
        folders |= {os.path.abspath(self.folder)} if held else set()
        self.root = os.path.commonpath(folders) if folders else None

    def of(self, sample: Sample) -> tuple[str, ...]:
        """The references of a sample's images; images that its data file holds are written.

        Raises:
            SampleError: an image cannot be read.
            TransientError, CheckpointError: it cannot be written.
        """
        if self.unchanged or not sample.images:
            return sample.images
        assert self.root is not None, "samples have images"
        files = [place if os.path.isabs(place) else self._written(place) for place in sample.places]
        return tuple(os.path.relpath(file, self.root) for file in files)

    def _written(self, place: str) -> str:
        data = read_place(place)
        with Image.open(io.BytesIO(data)) as image:
            kind = (image.format or "image").lower()
        path = self.folder / f"{hashlib.sha256(data).hexdigest()}.{kind}"
        if not path.exists():
            with explained_write_faults(self.folder, path.name, again=AGAIN):
                self.folder.mkdir(parents=True, exist_ok=True)
                part = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
                try:
                    part.write_bytes(data)
                    part.replace(path)
                finally:
                    part.unlink(missing_ok=True)
        return os.path.abspath(path)
