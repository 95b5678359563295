"""The caches of a run, each compared with the recipe and the student on its own."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.errors import AlignkdError, CacheError
from alignkd.losses.recipes import Recipe
from alignkd.models.vlm import Vlm
from alignkd.pipeline.cache_io.compatibility import check_attention_layers, check_student_compatible
from alignkd.pipeline.cache_io.cross_model import CrossModelMap


@dataclass(frozen=True)
class OpenCache:
    """A cache that fits a student. ``cross_model``: how its rows become the student's targets, None where they stay unchanged.

    ``teacher_layers``: how many layers its teacher has, None where the recipe compares no attention from the cache. ``weight``:
    how much its teacher counts for a sample that others teach, too.
    """

    reader: CacheReader
    cross_model: CrossModelMap | None
    teacher_layers: int | None
    weight: float = 1.0


@contextmanager
def naming_cache(reader: CacheReader, caches: int) -> Iterator[None]:
    """Where a run has several ``caches``, errors about one of them say which."""
    try:
        yield
    except AlignkdError as error:
        if caches == 1 or reader.url in str(error):
            raise
        raise type(error)(f"--cache {reader.url}: {error}") from error


def fit_cache(
    reader: CacheReader,
    student: Vlm,
    recipe: Recipe,
    needs: frozenset[str],
    template: str,
    max_length: int,
    weight: float = 1.0,
) -> OpenCache:
    """Compare a cache with the student. ``needs``: the targets that are read from it.

    Raises:
        AlignkdError: names what differs, and what to do.
    """
    found, fields = reader.fingerprint, [field.name for field in reader.spec.fields]
    cross_model = check_student_compatible(student, found, template, max_length, reader.url, needs=needs, fields=fields)
    layers = check_attention_layers(student, found, recipe) if "attention" in needs else None
    return OpenCache(reader, cross_model, layers, weight)


def common_prompt_date(caches: Sequence[OpenCache]) -> str | None:
    """The date that prompts show where the template writes one; None where no cache says it.

    Raises:
        CacheError: two caches, whose rows are used unchanged, have prompts of different dates.
    """
    dates = {
        cache.reader.url: str(cache.reader.fingerprint["prompt_date"])
        for cache in sorted(caches, key=lambda cache: cache.cross_model is not None)
        if "prompt_date" in cache.reader.fingerprint
    }
    own = {url: date for url, date in dates.items() if any(c.reader.url == url and c.cross_model is None for c in caches)}
    if len(set(own.values())) > 1:
        shown = ", ".join(f"{date} in {url}" for url, date in own.items())
        raise CacheError(
            f"the caches have prompts of different dates ({shown}), so that the student's prompts can match one of them"
            " alone: write them with the same --prompt-date"
        )
    return next(iter(dates.values()), None)
