"""How many positions each sample of a training set takes: for batches of similar length, or within a budget of positions.

A cache knows how many ids its rows have. Without a cache, or where its teacher has other tokens than the student, every text is
tokenised once, by a few processes. The lengths are kept beside the run, so that a resumed run does not count again.
"""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset

from alignkd.cache_store.storage.local import LocalStorage
from alignkd.errors import ConfigError, SampleError
from alignkd.models.vlm import Vlm
from alignkd.pipeline.cache_io.compatibility import has_rows_of_student
from alignkd.pipeline.feeding.dataset import TrainingSet
from alignkd.pipeline.runtime.progress import progress_bar
from alignkd.pipeline.runtime.signals import ignore_stop_signals

_CHUNK = 256
"""Samples a worker counts at a time."""
_FEW = 4096
"""Up to this many samples one process counts sooner than worker processes start."""


def sample_lengths(data: TrainingSet, student: Vlm, folder: Path, *, workers: int = 0, show: bool = True) -> np.ndarray:
    """Positions of each sample, ``[samples]`` int32: its ids, each image as its vision tokens. 0 for a rejected sample.

    They are kept in ``folder/lengths-DIGEST.npy``, with a digest of everything that they depend on, and read from there
    if the file exists. ``show``: a progress bar.
    """
    storage, name = LocalStorage(folder), f"lengths-{_digest(data, student)}.npy"
    lengths = _read(storage, name, len(data))
    if lengths is None:
        lengths = _from_cache(data, student)
        if lengths is None:
            lengths = _count(data, workers if len(data) > _FEW else 0, show)
        buffer = io.BytesIO()
        np.save(buffer, lengths)
        storage.delete(name)
        storage.write(name, buffer.getvalue())
    return lengths


def check_budget(data: TrainingSet, lengths: np.ndarray, batch_tokens: int) -> None:
    """Refuse a budget that is smaller than some sample.

    Raises:
        ConfigError: names the longest sample, its length, and what to do.
    """
    longest = int(lengths.argmax())
    if lengths[longest] > batch_tokens:
        sample = data.sample(longest)
        over = int((lengths > batch_tokens).sum())
        raise ConfigError(
            f"sample {sample.id or sample.key!r} takes {lengths[longest]:,} positions with its images, more than"
            f" --batch-tokens {batch_tokens:,}, as do {over:,} of {len(data):,} samples in all; give --batch-tokens"
            f" {lengths[longest]} or more, or a smaller --max-length (a cache must be written with the same)"
        )


def _from_cache(data: TrainingSet, student: Vlm) -> np.ndarray | None:
    """The lengths of the rows in the caches; None where some sample has no row whose ids are those of the student."""
    encoder, counts, found = data.preparer.encoder, data.samples.image_counts, None
    if counts is None:
        return None
    keys = data.samples.keys[data.indices]
    for cache in data.caches:
        if cache.cross_model is not None:
            continue
        if not has_rows_of_student(student, cache.reader.fingerprint, encoder.template, encoder.max_length):
            continue
        ids, places = cache.reader.first_dimensions("input_ids"), cache.reader.plan.locate(keys)
        ids = np.where(places >= 0, ids[places], -1)
        found = ids if found is None else np.where(found > 0, found, ids)
    if found is None or (data.teaching is not None and (found <= 0).any()):
        return None
    images = counts[data.indices] * (student.tokens_per_placeholder - 1)
    return np.where(found > 0, found + images, 0).astype(np.int32)


class _Lengths(Dataset["list[int]"]):
    """The lengths of samples, a chunk at a time."""

    def __init__(self, data: TrainingSet) -> None:
        self.data = data

    def __len__(self) -> int:
        return -(-len(self.data) // _CHUNK)

    def __getitem__(self, chunk: int) -> list[int]:
        positions = range(chunk * _CHUNK, min((chunk + 1) * _CHUNK, len(self.data)))
        return [self._length(position) for position in positions]

    def _length(self, position: int) -> int:
        sample = self.data.sample(position)
        try:
            return self.data.preparer.text(sample).length
        except SampleError:
            return 0  # the loader reports it when the sample is used


def _count(data: TrainingSet, workers: int, show: bool) -> np.ndarray:
    chunks = DataLoader(_Lengths(data), batch_size=None, num_workers=workers, worker_init_fn=ignore_stop_signals)
    found: list[int] = []
    with progress_bar("lengths", len(data), "samples", show=show) as progress:
        for lengths in chunks:
            found += lengths
            progress.advance(len(lengths))
    return np.asarray(found, dtype=np.int32)


def _digest(data: TrainingSet, student: Vlm) -> str:
    preparer = data.preparer
    about = [
        data.fingerprint(),
        student.tokenizer_fingerprint(),
        preparer.encoder.template,
        preparer.encoder.max_length,
        student.image_fingerprint(),
        student.vision_tokens_per_image,
    ]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


def _read(storage: LocalStorage, name: str, samples: int) -> np.ndarray | None:
    """The lengths of an earlier run; None where there are none, or where they are damaged."""
    try:
        stored = storage.read(name)
    except FileNotFoundError:
        return None
    try:
        lengths: np.ndarray = np.load(io.BytesIO(stored), allow_pickle=False)
    except (ValueError, EOFError):
        return None
    return lengths if lengths.shape == (samples,) and lengths.dtype == np.int32 else None
