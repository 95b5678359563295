"""Compare a cached row with the sample it is used for: a row of another sample must never be used silently."""

from collections.abc import Mapping

import numpy as np

from alignkd.cache_store.rows.row import EncodedField, Row
from alignkd.errors import CacheError
from alignkd.inputs.batch import Collator, Layout
from alignkd.pipeline.config.cache_layout import attention_layer
from alignkd.pipeline.data.preparer import Prepared
from alignkd.pipeline.data.sample import Sample


class MisalignedRowError(CacheError):
    """A cached row does not belong to the sample it is used for."""


def check_row(
    sample: Sample,
    prepared: Prepared,
    row: Row,
    stored: Mapping[str, EncodedField],
    collator: Collator,
) -> None:
    """Compare a row, and its fields ``stored`` still encoded, with the sample as this run prepared it.

    ``collator``: the student's.

    Raises:
        MisalignedRowError: token ids, labels, images, or the number of vision tokens or text rows differ; names the sample and
            the cause.
    """
    found: str | None = None
    if not np.array_equal(row.values["input_ids"], prepared.input.input_ids):
        found = "its token ids differ: the tokenizer, template or maximum length is not the cache's"
    elif not np.array_equal(row.values["labels"], prepared.input.labels):
        found = "its labels differ: the template is not the cache's"
    else:
        check_images(sample, prepared, row)
        found = _misshapen(collator.expand(prepared.input), stored)
    if found is not None:
        raise MisalignedRowError(f"sample {sample.id!r} does not match its row in the cache: {found}")


def check_images(sample: Sample, prepared: Prepared, row: Row) -> None:
    """Compare the image files of a row with those that this run read, if it reads any.

    Raises:
        MisalignedRowError: they differ; names the sample and the cause.
    """
    if not prepared.images_unread and row.image_sha256 != prepared.image_sha256:
        raise MisalignedRowError(
            f"sample {sample.id!r} does not match its row in the cache: its image file differs from the one the teacher saw:"
            " --images points elsewhere, or the file has changed"
        )


def _misshapen(layout: Layout, stored: Mapping[str, EncodedField]) -> str | None:
    """What is wrong with the number of vision tokens or text rows."""
    rows, columns = len(layout.text_rows), len(layout.vision_columns)
    if "vision_tokens" in stored and (held := stored["vision_tokens"].shape[0]) != columns:
        return f"it holds {held} vision tokens where the student has {columns}"
    for name in (name for name in stored if attention_layer(name) is not None):
        held_rows, held_columns = stored[name].shape[1:]
        if (held_rows, held_columns) != (rows, columns):
            return (
                f"it holds attention of {held_rows} text rows to {held_columns} vision tokens where the student has"
                f" {rows} and {columns}"
            )
    return None
