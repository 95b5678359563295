"""One row of a cache: decoded arrays, figures about them, and a plot of its attention.

Shapes: H heads, T text rows, V vision columns, D teacher width, A answers, K kept tokens, R regions, N vocabulary.
"""

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from alignkd.cache_store.protocol.names import RUNS
from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.cache_store.rows.row import Row
from alignkd.errors import CacheError, DataError, wrap_errors
from alignkd.inputs.prompts import IGNORE, IMAGE_TOKEN_ID
from alignkd.inputs.spans import counted
from alignkd.pipeline.config.cache_layout import ADVANTAGE, LOGIT_TENSOR, attention_layer, is_slice
from alignkd.pipeline.config.fingerprint_keys import check_fingerprint_keys
from alignkd.targets.logit_levels import decode_kept

ID_OF_RANK = LOGIT_TENSOR.format("id_of_rank")
"""The tensor of a cache that turns ranks into token ids."""

_OWN_LOADER = ("mobilevlm", "minigpt4")
_RECOMPUTED = "stage two recomputes attention and vision tokens from the teacher's slice, which the cache holds once"


def find_row(reader: CacheReader, sample_id: str) -> Row:
    """The row of a sample id; the first one where several samples share it.

    Raises:
        DataError: the cache has none.
    """
    keys = reader.find(sample_id)
    row_keys = [key for key in keys if key not in reader.rejected]
    if not row_keys:
        rejected = reader.rejected[keys[0]] if keys else None
        why = f"it was rejected: {rejected.reason}" if rejected else f"it holds {len(reader)} other samples"
        raise DataError(f"{reader.url} has no row of sample {sample_id!r}; {why}")
    return reader.row(row_keys[0])


def row_arrays(reader: CacheReader, row: Row) -> dict[str, np.ndarray]:
    """A row's values, under the names that ``alignkd show --save`` uses; log-probabilities as stage two decodes them.

    Raises:
        CacheError: fingerprint, row and tensors of the cache contradict each other.
    """
    check_fingerprint_keys(reader.fingerprint, "targets", cache=reader.url)
    message = f"the row of {row.sample_id!r} cannot be decoded: run alignkd cache verify {shlex.quote(reader.url)}"
    with wrap_errors(CacheError, message, KeyError, IndexError, TypeError, ValueError):
        logits = reader.fingerprint["targets"]["logits"]
        return named_arrays(row.values, logits and logits["kind"], lambda: reader.tensors[ID_OF_RANK])


def named_arrays(
    values: Mapping[str, np.ndarray], logits: str | None, id_of_rank: Callable[[], np.ndarray]
) -> dict[str, np.ndarray]:
    """The values of a row under their public names. ``logits``: their kind; ``id_of_rank``: the tensor of this name."""
    arrays = {"input_ids": values["input_ids"].astype(np.int64), "labels": values["labels"].astype(np.int64)}
    layers = {name: layer for name in values if (layer := attention_layer(name)) is not None}
    arrays |= {f"attention_{layer}_HTV" if layer else "attention_HTV": values[name] for name, layer in layers.items()}
    if "vision_tokens" in values:
        arrays["vision_tokens_VD"] = values["vision_tokens"]
    if ADVANTAGE in values:
        arrays["advantage_A"] = values[ADVANTAGE]
    if logits is None:
        return arrays
    if logits == "hidden":
        return {**arrays, "hidden_AD": values["hidden"]}
    kept = values["topk_rank_steps"], values["topk_logprob_codes"], values["tail_logmass"]
    ids_AK, logprobs_AK, tail_A = decode_kept(*kept, id_of_rank())
    return {**arrays, "topk_ids_AK": ids_AK, "topk_logprobs_AK": logprobs_AK, "tail_mass_A": np.exp(tail_A)}


def row_figures(reader: CacheReader, row: Row) -> dict[str, Any]:
    """What a row is about, and the shapes of its arrays."""
    arrays = row_arrays(reader, row)
    figures: dict[str, Any] = {
        "id": row.sample_id,
        "key": row.key,
        "shard": reader.shard_of(row.key),
        "image_sha256": row.image_sha256,
        "shapes": {name: list(array.shape) for name, array in arrays.items()},
    }
    if arrays.get("attention_HTV", np.zeros(0)).size:
        figures["attention_on_images"] = float(arrays["attention_HTV"].sum(axis=2).mean())
    if arrays.get("advantage_A", np.zeros(0)).size:
        figures["mean_advantage"] = float(arrays["advantage_A"].mean())
    if "tail_mass_A" in arrays:
        figures["mean_tail_mass"] = float(arrays["tail_mass_A"].mean())
    if is_slice(reader.fingerprint):
        figures["alignment"] = _RECOMPUTED
    return figures


def plot_row(
    reader: CacheReader, row: Row, path: str, pictures: Sequence[np.ndarray] | None = None, text: str | None = None
) -> None:
    """Plot a row's attention over its images, or over grey ones: the cache holds none.

    ``text``: of the conversation, whose characters the rows' tokens are named by; without it they have their ids.

    Raises:
        CacheError: the cache holds no attention, or not where it lies in the image.
        DataError: the sample has no image.
    """
    from alignkd.pipeline.figures.attention import attention_figure, save_figure  # loads matplotlib

    attention_HTV = row_arrays(reader, row).get("attention_HTV")
    if attention_HTV is None:
        why = f": {_RECOMPUTED}; alignkd show plots a model's own" if is_slice(reader.fingerprint) else ""
        raise CacheError(f"the row of {row.sample_id!r} holds no attention to draw{why}")
    if not attention_HTV.size:
        raise DataError(f"the row of {row.sample_id!r} holds no attention to draw: it has no text after an image")
    if "regions" not in row.values:
        raise CacheError(
            f"the row of {row.sample_id!r} does not say where its vision tokens lie in the image: write another cache with"
            " alignkd cache-teacher"
        )
    regions_R8 = row.values["regions"]
    if pictures is None:
        pictures = [np.full((96, 96, 3), 0.5)] * len(set(regions_R8[:, 0].tolist()))
    title = f"{row.sample_id}: cached teacher attention"
    figure = attention_figure(pictures, attention_HTV, regions_R8, title, row_pieces(reader, row, text))
    save_figure(figure, path)


def row_pieces(reader: CacheReader, row: Row, text: str | None) -> list[str]:
    """A name for each text row ``[T]``: the characters that its token stands for, else its id; then its advantage, if any."""
    is_image = row.values["input_ids"] == reader.fingerprint["teacher"].get("image_token_id", IMAGE_TOKEN_ID)
    rows = np.flatnonzero(~is_image & (np.cumsum(is_image) > 0))
    names = [f"id {token}" for token in row.values["input_ids"][rows].tolist()]
    if text is not None and len(row.values.get("spans", ())) == len(is_image):
        characters = np.array(list(text))[counted(text)]
        spans = row.values["spans"][rows].tolist()
        names = ["".join(characters[start:end]) or name for (start, end), name in zip(spans, names, strict=True)]
    if ADVANTAGE not in row.values:
        return names
    # The first id is predicted by none, and has no advantage.
    gained = dict(zip(np.flatnonzero(row.values["labels"][1:] != IGNORE) + 1, row.values[ADVANTAGE].tolist(), strict=True))
    return [f"{name} +{gained[place]:.2f}" if place in gained else name for name, place in zip(names, rows, strict=True)]


def recorded_inputs(reader: CacheReader) -> list[tuple[str | tuple[str, ...], str | tuple[str, ...] | None]]:
    """``--data`` and ``--images`` of the runs that wrote the cache, as they were typed, each once.

    What lies on a network is not looked up for a record, which may come from others.
    """
    found = dict[tuple[str | tuple[str, ...], str | tuple[str, ...] | None], None]()
    for name in reader.storage.names(RUNS):
        with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
            configuration = json.loads(reader.storage.read(f"{RUNS}/{name}"))["configuration"]
            data, images = _paths(configuration["data"]), _paths(configuration["images"] or [])
            if data and all("://" not in path and "::" not in path for path in (*data, *images)):
                found[data[0] if len(data) == 1 else data, images[0] if len(images) == 1 else images or None] = None
    return list(found)


def _paths(value: Any) -> tuple[str, ...]:
    found = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(path, str) and path for path in found):
        raise ValueError("expected paths")
    return found


def turns_images(reader: CacheReader) -> bool:
    """Whether the teacher sees an image as its EXIF orientation says: all families but those with a loader of their own."""
    return not str(reader.fingerprint["teacher"].get("family", "")).startswith(_OWN_LOADER)
