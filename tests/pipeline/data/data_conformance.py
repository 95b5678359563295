"""What every reader of data does. A shape is one entry of :data:`SHAPES`, which writes records of LLaVA into a folder."""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_shapes import write_parquet, write_saved, write_webdataset
from tiny_runs import IMAGES, SAMPLES, TEXT_ONLY, record

Record = Any
WITH_SYSTEM = record("system6", "1.png", "<image>\nWhat is it?", "A ball.")
WITH_SYSTEM["conversations"].insert(0, {"from": "system", "value": "Answer in two words."})
NUMBER_ID = {**copy.deepcopy(TEXT_ONLY), "id": 7}
GOOD = [*SAMPLES, WITH_SYSTEM, NUMBER_ID]
"""Text alone, one image, two images, a system turn, an id that is a number."""

NOTHING_SAID = {"id": "nothing said", "conversations": []}
WRONG_SPEAKER = {"id": "wrong speaker", "conversations": [{"from": "nobody", "value": "a"}, {"from": "gpt", "value": "b"}]}
TOO_FEW_IMAGES = record("too few images", ["0.png"], "<image>\nWhat?", "a", "And <image>?", "b")
BAD = [NOTHING_SAID, WRONG_SPEAKER, TOO_FEW_IMAGES]


def mixed() -> list[Record]:
    """Good and bad records in turn."""
    return [GOOD[0], BAD[0], *GOOD[1:3], BAD[1], *GOOD[3:], BAD[2]]


def write_json(records: list[Record], folder: Path) -> str:
    (folder / "d.json").write_text(json.dumps(records, indent=1))
    return "d.json"


def write_lines(records: list[Record], folder: Path) -> str:
    (folder / "d.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return "d.jsonl"


def compressed(write: Callable[[list[Record], Path], str]) -> Callable[[list[Record], Path], str]:
    def write_compressed(records: list[Record], folder: Path) -> str:
        name = write(records, folder)
        (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
        (folder / name).unlink()
        return f"{name}.gz"

    return write_compressed


def as_messages(one: Record) -> Record:
    """A record of LLaVA as messages with texts."""
    roles = {"human": "user", "gpt": "assistant"}
    made = {name: value for name, value in one.items() if name not in ("conversations", "image")}
    made["messages"] = [{"role": roles.get(t["from"], t["from"]), "content": t["value"]} for t in one["conversations"]]
    if "image" in one:
        made["images"] = one["image"] if isinstance(one["image"], list) else [one["image"]]
    return made


def as_typed(one: Record) -> Record:
    """A record of LLaVA as messages with lists of texts and images."""
    made = as_messages(one)
    for message in made["messages"]:
        parts = message["content"].split("<image>")
        items: list[Any] = [{"type": "text", "text": parts[0]}] if parts[0] else []
        for part in parts[1:]:
            items += [{"type": "image"}, *([{"type": "text", "text": part.removeprefix("\n")}] if part.strip("\n") else [])]
        message["content"] = items
    return made


def as_sharegpt(one: Record) -> Record:
    """A record of LLaVA with the speakers that other tools write."""
    roles = {"human": "user", "gpt": "assistant"}
    made = copy.deepcopy(one)
    for turn in made["conversations"]:
        turn["from"] = roles.get(turn["from"], turn["from"])
    return made


def with_text_id(one: Record) -> Record:
    """A record whose id is a text: a column holds one type."""
    return {**one, "id": str(one["id"])}


def shaped(
    shape: Callable[[Record], Record], write: Callable[[list[Record], Path], str]
) -> Callable[[list[Record], Path], str]:
    return lambda records, folder: write([shape(one) for one in records], folder)


SHAPES: dict[str, Callable[[list[Record], Path], str]] = {
    "llava-json": write_json,
    "llava-jsonl": write_lines,
    "llava-json-gz": compressed(write_json),
    "llava-jsonl-gz": compressed(write_lines),
    "messages-jsonl": shaped(as_messages, write_lines),
    "messages-json-gz": shaped(as_messages, compressed(write_json)),
    "messages-typed": shaped(as_typed, write_lines),
    "sharegpt": shaped(as_sharegpt, write_json),
    "parquet": shaped(with_text_id, lambda records, folder: write_parquet(folder / "d.parquet", records, IMAGES).name),
    "parquet-folder": shaped(with_text_id, lambda records, folder: write_parquet(folder / "d", records, IMAGES, shards=3).name),
    "parquet-of-paths": shaped(with_text_id, lambda records, folder: write_parquet(folder / "d.parquet", records, None).name),
    "saved-dataset": shaped(with_text_id, lambda records, folder: write_saved(folder / "d", records, IMAGES).name),
    "webdataset": lambda records, folder: write_webdataset(folder / "d", records, IMAGES).removeprefix(f"{folder}/"),
    "webdataset-of-paths": lambda records, folder: write_webdataset(folder / "d", records, None).removeprefix(f"{folder}/"),
}
"""Writes records of LLaVA into a folder, and returns the name of the data there. Some records are bad: see :data:`BAD`."""
