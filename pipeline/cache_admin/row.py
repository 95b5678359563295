"""Look into a cache: its specification, or one row decoded, in words and as a picture."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.cache_store.rows.row import Row
from alignkd.pipeline.config.cache_layout import LOGIT_TENSOR, attention_layer, is_slice
from alignkd.targets.logit_levels import decode_kept

_RECOMPUTED = "stage two recomputes attention and vision tokens from the teacher's slice, which the cache holds once"


def find_row(reader: CacheReader, sample_id: str) -> Row:
    """The row of a sample id; the first one where several samples share it.

    Raises:
        ValueError: the cache has none.
    """
    keys = reader.find(sample_id)
    if not keys:
        rejected = next((r for r in reader.rejected.values() if r.sample_id == sample_id), None)
        why = f"it was rejected: {rejected.reason}" if rejected else f"it holds {len(reader)} other samples"
        raise ValueError(f"{reader.url} has no row of sample {sample_id!r}; {why}")
    return reader.row(keys[0])


def row_arrays(reader: CacheReader, row: Row) -> dict[str, np.ndarray]:
    """A row's values under the names that ``alignkd show --save`` uses; log-probabilities as stage two decodes them."""
    values = row.values
    arrays = {"input_ids": values["input_ids"].astype(np.int64), "labels": values["labels"].astype(np.int64)}
    layers = {name: layer for name in values if (layer := attention_layer(name)) is not None}
    arrays |= {f"attention_{layer}_HTV" if layer else "attention_HTV": values[name] for name, layer in layers.items()}
    if "vision_tokens" in values:
        arrays["vision_tokens_VD"] = values["vision_tokens"]
    if reader.fingerprint["targets"]["logits"] is not None:
        arrays |= _answer_arrays(reader, values)
    return arrays


def _answer_arrays(reader: CacheReader, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    if reader.fingerprint["targets"]["logits"]["kind"] == "hidden":
        return {"hidden_AD": values["hidden"]}
    id_of_rank_N = reader.tensors[LOGIT_TENSOR.format("id_of_rank")]
    kept = values["topk_rank_steps"], values["topk_logprob_codes"], values["tail_logmass"]
    ids_AK, logprobs_AK, tail_A = decode_kept(*kept, id_of_rank_N)
    return {"topk_ids_AK": ids_AK, "topk_logprobs_AK": logprobs_AK, "tail_mass_A": np.exp(tail_A)}


def row_figures(reader: CacheReader, row: Row) -> dict[str, Any]:
    """A row in words."""
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
    if "tail_mass_A" in arrays:
        figures["mean_tail_mass"] = float(arrays["tail_mass_A"].mean())
    if is_slice(reader.fingerprint):
        figures["alignment"] = _RECOMPUTED
    return figures


def plot_row(reader: CacheReader, row: Row, path: str) -> None:
    """Draw a row's attention over a grey field: the cache holds no image.

    Raises:
        ValueError: the cache holds no attention, or the sample no image.
    """
    from alignkd.pipeline.figures.attention import attention_figure, save_figure

    arrays = row_arrays(reader, row)
    if not arrays.get("attention_HTV", np.zeros(0)).size:
        why = f": {_RECOMPUTED}; alignkd show draws a model's own" if is_slice(reader.fingerprint) else ""
        raise ValueError(f"the row of {row.sample_id!r} holds no attention to draw{why}")
    regions_R8 = row.values["regions"]
    pictures = [np.full((96, 96, 3), 0.5)] * len(set(regions_R8[:, 0].tolist()))
    figure = attention_figure(pictures, arrays["attention_HTV"], regions_R8, f"{row.sample_id}: cached teacher attention")
    save_figure(figure, path)
