"""The members of tar archives, and how they make samples: as tarfile and webdataset read them."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile

import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkd.errors import DataError
from alignkd.pipeline.config.shared import DataSettings
from alignkd.pipeline.data.open_samples import open_samples
from alignkd.pipeline.data.readers.archives.groups import groups
from alignkd.pipeline.data.readers.archives.members import members

NAMES = st.text("abc/.012_é", min_size=1, max_size=140).map(lambda name: name.strip("/")).filter(lambda name: name.strip("./"))
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def archive(*files, format=tarfile.PAX_FORMAT, **headers):
    """Bytes of an archive of (name, content) or TarInfo."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for file in files:
            if isinstance(file, tarfile.TarInfo):
                tar.addfile(file)
            else:
                info = tarfile.TarInfo(file[0])
                info.size = len(file[1])
                tar.addfile(info, io.BytesIO(file[1]))
    return out.getvalue()


def read(data):
    return [(m.name, data[m.start : m.stop]) for m in members(io.BytesIO(data), len(data), "shard.tar")]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(NAMES, st.binary(max_size=1100)), max_size=6), st.sampled_from(FORMATS))
def test_names_and_bytes_are_those_that_tarfile_reads(files, form):
    try:
        data = archive(*files, format=form)
    except ValueError:  # names that ustar cannot hold
        return
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(info.name, tar.extractfile(info).read()) for info in tar if info.isreg()]
    assert read(data) == expected


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "d/a", "__meta__", "d.e/c"]),
            st.sampled_from(["", ".json", ".jpg", ".0.JPG", ".img1.png"]),
        ),
        max_size=8,
    )
)
def test_samples_are_those_of_webdataset(tmp_path_factory, names):
    path = tmp_path_factory.mktemp("wds") / "shard.tar"
    path.write_bytes(archive(*((base + suffix, str(i).encode()) for i, (base, suffix) in enumerate(names))))
    data = path.read_bytes()
    found = list(groups(members(io.BytesIO(data), len(data), "shard.tar")))
    try:
        theirs = list(wds.WebDataset(str(path), shardshuffle=False, empty_check=False))
    except ValueError:
        assert any(group.twice for group in found)
        return
    assert not any(group.twice for group in found)
    ours = [{"__key__": group.key, **{s: data[m.start : m.stop] for s, m in group.members.items()}} for group in found]
    assert ours == [{k: v for k, v in sample.items() if k == "__key__" or not k.startswith("__")} for sample in theirs]


def test_images_come_in_the_order_of_their_numbers():
    data = archive(*((f"a.{suffix}", b"") for suffix in ("json", "img10.png", "img2.png", "img1.png")))
    (group,) = groups(members(io.BytesIO(data), len(data), "shard.tar"))
    assert [image.name for image in group.images] == ["a.img1.png", "a.img2.png", "a.img10.png"]


def special(kind, name="a.jpg"):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


def test_links_and_devices_have_no_bytes_and_folders_are_no_members():
    kinds = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
    data = archive(*(special(kind) for kind in kinds), ("a.json", b"{}"))
    found = list(members(io.BytesIO(data), len(data), "shard.tar"))
    assert [(m.name, m.size, m.regular) for m in found] == [("a.jpg", 0, False)] * 4 + [("a.json", 2, True)]


@pytest.mark.parametrize("name", ["a.jpg", "a.json"])
def test_a_sample_whose_image_or_text_is_a_link_is_rejected_and_not_read_without_it(tmp_path, name):
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]
    record = json.dumps({"id": "a", "conversations": turns}).encode()
    other = ("a.json", record) if name != "a.json" else ("a.jpg", b"x")
    files = archive(special(tarfile.SYMTYPE, name), other, ("b.json", record.replace(b'"a"', b'"b"')))
    (tmp_path / "shard.tar").write_bytes(files)
    first, second = open_samples(DataSettings(data=str(tmp_path / "shard.tar")))
    assert re.search(rf"the member {re.escape(name)} is a link or another thing .*pack the file itself", first.fault)
    assert not second.fault


WHOLE = archive(("a.json", b"{}" * 300), ("a.jpg", b"x" * 700), ("ü" * 90 + ".json", b"{}"), format=tarfile.PAX_FORMAT)


@pytest.mark.parametrize("kept", [0, 100, 512, 700, 1024, 1536, 2048, 3000, 3584, 4096, 4608])
def test_an_archive_that_is_cut_short_is_one_message(kept):
    assert kept < len(WHOLE) - 10240 + 5120
    with pytest.raises(DataError, match=r"shard\.tar: not a whole tar archive: (cut short|empty|no header)"):
        read(WHOLE[:kept])


def test_a_damaged_header_or_another_file_is_one_message():
    for data in (os.urandom(4096), WHOLE[:4] + b"?" + WHOLE[5:], b"PK\3\4" + bytes(2000)):
        with pytest.raises(DataError, match="no header of a tar archive"):
            read(data)


def test_a_name_that_claims_any_memory_is_not_read():
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 1 << 40
    with pytest.raises(DataError, match="at most"):
        read(info.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
