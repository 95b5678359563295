"""The record of a sample of a WebDataset shard: its member KEY.json, and what its images are known by."""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from alignkd.errors import SampleError
from alignkd.pipeline.data.readers.archives.groups import Group
from alignkd.pipeline.data.records import LARGEST_RECORD

IMAGES = ("image", "images", "video")


def tar_record(text: bytes) -> dict[str, Any]:
    """The record in KEY.json.

    Raises:
        SampleError: it is no JSON object.
    """
    try:
        record = json.loads(text)
    except RecursionError:
        raise SampleError("KEY.json is nested too deeply") from None
    except ValueError as error:
        raise SampleError(f"KEY.json is not JSON ({error})") from None
    if not isinstance(record, dict):
        raise SampleError("KEY.json holds no object")
    return record


def names_images(record: dict[str, Any]) -> bool:
    """Whether a record says itself what its images are known by."""
    return any(record.get(name) not in (None, "", []) for name in IMAGES)


def check_group(group: Group) -> None:
    """SampleError for members that make no sample."""
    if group.twice:
        raise SampleError(f"the member {group.key}.{group.twice} is there twice")
    if group.irregular:
        raise SampleError(
            f"the member {group.key}.{group.irregular[0]} is a link or another thing without bytes of its own, and no link is"
            " followed: pack the file itself (tar --dereference)"
        )
    if group.text is not None and group.text.size > LARGEST_RECORD:
        raise SampleError(f"KEY.json has {group.text.size:,} bytes, more than the {LARGEST_RECORD:,} a record may have")
    if group.text is None:
        found = ", ".join(sorted(group.members))
        raise SampleError(f"there is no member KEY.json: found {found}")


def with_digests(record: dict[str, Any], digests: Sequence[str]) -> dict[str, Any]:
    """The record with images that it does not name, known by the SHA-256 of their bytes."""
    return {**record, "images" if "messages" in record else "image": list(digests)} if digests else record


def digests(group: Group, read: Callable[[int, int], bytes]) -> list[str]:
    """The SHA-256 of each image of a sample; ``read`` returns the bytes from one place to another."""
    return [hashlib.sha256(read(image.start, image.stop)).hexdigest() for image in group.images]
