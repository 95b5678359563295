from __future__ import annotations

import errno
import os
import pickle
import shutil
import socket
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_runs import GOLDEN_SAMPLES, IMAGES, SAMPLES, record, write_data

from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.errors import SampleError, TransientError
from alignkd.inputs.batch import Collator
from alignkd.models.encoders import image_files
from alignkd.pipeline.data.preparer import Prepared, Preparer
from alignkd.pipeline.data.sample import parse_sample
from alignkd.pipeline.data.samples import SampleFile
from alignkd.pipeline.feeding.dataset import FailedSample, TrainingExample, TrainingSet
from alignkd.pipeline.feeding.row_checks import MisalignedRowError, check_row
from alignkd.pipeline.runtime import retries
from alignkd.targets.batch_targets import Targets

ALL = frozenset({"attention", "vision", "logits"})

ANSWERS = {"topk_rank_steps", "topk_logprob_codes", "tail_logmass", "sketch"}


def preparer(vlm, root=IMAGES, template="v1", max_length=2048):
    return Preparer.of(vlm, template=template, max_length=max_length, image_root=root)


def training_set(vlm, data, cache, *, root=IMAGES, template="v1", needs=ALL):
    reader = CacheReader(cache) if cache else None
    return TrainingSet(SampleFile(data), preparer(vlm, root, template), student=vlm, reader=reader, needs=needs, max_rejected=5)


def with_image(path):
    return parse_sample(record("a", path, "<image>\nWhat?", "This."), "")


@pytest.mark.parametrize("kind", ["parent", "absolute", "behind a link"])
def test_an_image_outside_the_image_folder_is_refused(student_vlm, tmp_path, kind):
    root = tmp_path / "images"
    root.mkdir()
    shutil.copyfile(IMAGES / "0.png", tmp_path / "secret.png")
    (tmp_path / "elsewhere" / "below").mkdir(parents=True)
    (root / "link").symlink_to(tmp_path / "elsewhere" / "below")
    path = {"parent": "../secret.png", "absolute": str(tmp_path / "secret.png"), "behind a link": "link/../../secret.png"}[kind]
    with pytest.raises(SampleError, match="lies outside the image folder"):
        preparer(student_vlm, root)(with_image(path))


def test_images_behind_links_inside_the_image_folder_are_followed(student_vlm, tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    (root / "link.png").symlink_to(IMAGES / "0.png")
    (root / "coco").symlink_to(IMAGES)
    found = [preparer(student_vlm, root)(with_image(name)).image_sha256 for name in ("link.png", "coco/0.png", "x/../link.png")]
    assert found == [preparer(student_vlm)(with_image("0.png")).image_sha256] * 3


def test_an_absolute_path_inside_the_image_folder_is_read(student_vlm, tmp_path):
    (tmp_path / "images").symlink_to(IMAGES)
    for path in (IMAGES / "0.png", tmp_path / "images" / "0.png"):
        assert preparer(student_vlm, tmp_path / "images")(with_image(str(path))).image_sha256


@pytest.mark.parametrize("kind", ["a named pipe", "a device", "a socket", "a directory"])
def test_what_is_no_plain_file_is_a_sample_error_at_once(student_vlm, tmp_path, kind):
    path = tmp_path / "x.png"
    with socket.socket(socket.AF_UNIX) as listening:
        if kind == "a named pipe":
            os.mkfifo(path)
        elif kind == "a device":
            path.symlink_to("/dev/zero")
        elif kind == "a socket":
            listening.bind(str(path))
        else:
            path.mkdir()
        with pytest.raises(SampleError, match=f"{kind}, expected a plain file"):
            preparer(student_vlm, tmp_path)(with_image("x.png"))


def failing_reads(monkeypatch, number, times):
    """Image files answer so many reads with an error, each time they are opened."""
    real, failed = image_files.read_plain, []

    def read(*arguments):
        if len(failed) < times:
            failed.append(arguments)
            raise OSError(number, os.strerror(number))
        return real(*arguments)

    monkeypatch.setattr(image_files, "read_plain", read)
    monkeypatch.setattr(retries, "FIRST_PAUSE_S", 0.0)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EMFILE])
def test_a_fault_of_storage_is_tried_again_and_is_never_the_samples(student_vlm, monkeypatch, number):
    failing_reads(monkeypatch, number, 4)
    assert preparer(student_vlm)(with_image("0.png")).image_sha256
    failing_reads(monkeypatch, number, 99)
    with pytest.raises(TransientError, match=r"0\.png failed 5 times"):
        preparer(student_vlm)(with_image("0.png"))


def test_too_little_memory_to_decode_is_no_fault_of_the_image(student_vlm, monkeypatch):
    def no_memory(_image):
        raise MemoryError

    monkeypatch.setattr(type(student_vlm.images), "decode", lambda _self, image: no_memory(image))
    with pytest.raises(TransientError, match="sample 'a': there is not enough memory"):
        preparer(student_vlm)(with_image("0.png"))


def test_a_sample_whose_record_cannot_be_read_is_a_sample_error(student_vlm, tmp_path):
    data = write_data(tmp_path / "d.json", [SAMPLES[0], {"id": "q", "conversations": []}])
    fault = SampleFile(data)[1]
    for use in (preparer(student_vlm), preparer(student_vlm).text, preparer(student_vlm).question):
        with pytest.raises(SampleError, match=r"record 1 \(id 'q'\): 'conversations' is"):
            use(fault)


def test_a_record_that_cannot_be_read_needs_no_row_in_the_cache(student_vlm, tmp_path, cache):
    bad = [{"id": "q", "conversations": []}, 5]
    whole = training_set(student_vlm, write_data(tmp_path / "d.json", [SAMPLES[0], *bad, SAMPLES[1]]), cache)
    assert [whole.sample(i).id for i in range(len(whole))] == ["cap0", "vqa1"]
    assert whole.rejects.count == 2


def test_the_image_folder_itself_may_be_a_link(student_vlm, tmp_path):
    (tmp_path / "images").symlink_to(IMAGES)
    assert preparer(student_vlm, tmp_path / "images")(with_image("0.png")).image_sha256


@pytest.mark.parametrize(
    "damage", ["missing", "empty", "no image", "cut short", "folder", "name with a zero byte", "long name", "loop"]
)
def test_an_image_that_cannot_be_read_is_a_sample_error_that_names_it(student_vlm, tmp_path, damage):
    path = tmp_path / "x.png"
    name = {"name with a zero byte": "x.png\0y", "long name": "x.png" * 100}.get(damage, "x.png")
    if damage == "folder":
        path.mkdir()
    elif damage == "loop":
        path.symlink_to(path)
    elif damage in ("empty", "no image", "cut short"):
        whole = (IMAGES / "0.png").read_bytes()
        path.write_bytes({"empty": b"", "no image": b"text " * 99, "cut short": whole[: len(whole) // 2]}[damage])
    with pytest.raises(SampleError, match=r"x\.png"):
        preparer(student_vlm, tmp_path)(with_image(name))


def test_text_that_is_no_unicode_is_a_sample_error(student_vlm):
    with pytest.raises(SampleError, match="its text is not Unicode"):
        preparer(student_vlm)(parse_sample(record("a", None, "what \ud800", "this"), ""))


def test_a_cut_that_leaves_no_answer_or_no_image_is_a_sample_error(student_vlm):
    one = with_image("0.png")
    whole = preparer(student_vlm)(one).input
    prompt = int((whole.labels == -100).sum())
    assert 10 < prompt < len(whole.input_ids)
    with pytest.raises(SampleError, match=f"no supervised token within {prompt} ids"):
        preparer(student_vlm, max_length=prompt)(one)
    assert preparer(student_vlm, max_length=len(whole.input_ids) - 1)(one).truncated
    two = parse_sample(record("a", ["0.png", "1.png"], "<image>what", "this", "<image>and", "that"), "")
    first = preparer(student_vlm)(two).input.input_ids.tolist().index(-200)
    with pytest.raises(SampleError, match=f"beyond the maximum length of {first + 5} ids"):
        preparer(student_vlm, max_length=first + 5)(two)
    with pytest.raises(SampleError, match="no supervised token: the answer is empty"):
        preparer(student_vlm)(parse_sample(record("a", None, "what", ""), ""))


def test_an_items_targets_are_those_of_its_own_sample_in_any_order_and_with_any_left_out(student_vlm, tmp_path, data, cache):
    whole = training_set(student_vlm, data, cache)
    by_id = {whole.sample(i).id: whole[i] for i in range(len(whole))}
    other = write_data(tmp_path / "other.json", [SAMPLES[i] for i in (5, 3, 0, 4)])
    part = training_set(student_vlm, other, cache)
    assert len(by_id) == 6
    assert [part.sample(i).id for i in range(len(part))] == ["two5", "vqa3", "cap0", "text4"]
    for i in range(len(part)):
        item, same = part[i], by_id[part.sample(i).id]
        assert isinstance(item, TrainingExample)
        np.testing.assert_array_equal(item.input.input_ids, same.input.input_ids)
        assert set(item.stored) == set(same.stored) == {"attention", "vision_tokens", *ANSWERS}
        for name, value in item.stored.items():
            assert value.shape == same.stored[name].shape
            for piece, codes in value.parts.items():
                np.testing.assert_array_equal(codes, same.stored[name].parts[piece])


def test_targets_of_a_batch_are_padded_without_mixing_samples(student_vlm, data, cache):
    whole = training_set(student_vlm, data, cache)
    items = [whole[i] for i in range(len(whole))]
    together = whole.collate(items)
    targets, batch = together["targets"].dequantise(), together["batch"]
    reader, start = CacheReader(cache), 0
    for i, item in enumerate(items):
        decoded = reader.row(whole.sample(i).key, {"attention", "vision_tokens"}).values
        _, rows, columns = decoded["attention"].shape
        assert (rows, columns) == (int(batch.text_mask_BT[i].sum()), int(batch.vision_mask_BV[i].sum()))
        np.testing.assert_array_equal(targets.attention[0][i, :, :rows, :columns], decoded["attention"])
        assert float(targets.attention[0][i].sum()) == pytest.approx(float(decoded["attention"].sum()), rel=1e-5)
        np.testing.assert_array_equal(targets.vision_BVD[i, :columns], decoded["vision_tokens"])
        assert not targets.vision_BVD[i, columns:].any()
        steps = item.stored["topk_rank_steps"].parts["values"]
        answers = len(steps)
        assert (batch.answer_samples_A[start : start + answers] == i).all()
        np.testing.assert_array_equal(targets.answers["topk_rank_steps"][start : start + answers], steps)
        start += answers
    assert start == len(batch.answer_ids_A) == len(targets.answers["topk_rank_steps"])


def test_only_the_fields_that_the_recipe_needs_are_read(student_vlm, data, cache):
    part = training_set(student_vlm, data, cache, needs=frozenset({"logits"}))
    assert set(part[0].stored) == ANSWERS


def test_attention_and_vision_tokens_reach_the_device_as_the_bytes_that_are_stored(student_vlm, data, cache):
    whole = training_set(student_vlm, data, cache)
    targets = whole.collate([whole[i] for i in range(6)])["targets"]
    found = [(q.codec, {p: t.dtype for p, t in q.parts.items()}) for q in (targets.attention[0], targets.vision_BVD)]
    assert found == [
        ("sqrt8", {"codes": torch.uint8, "scales": torch.float16}),
        ("int8-rows", {"codes": torch.int8, "scales": torch.float32}),
    ]


def test_a_changed_image_is_a_misaligned_row_that_names_sample_and_cause(student_vlm, tmp_path, data, cache):
    images = tmp_path / "images"
    shutil.copytree(IMAGES, images)
    shutil.copyfile(images / "1.png", images / "0.png")
    whole = training_set(student_vlm, data, cache, root=images)
    found = {item.sample_id: item for item in map(whole.__getitem__, range(6)) if isinstance(item, FailedSample)}
    assert set(found) == {"cap0", "two5"}
    for name, failure in found.items():
        assert failure.fatal
        for words in (repr(name), "its image file differs", "--images points elsewhere, or the file has changed"):
            assert words in failure.reason


def test_another_template_is_a_misaligned_row_that_names_sample_and_cause(student_vlm, tmp_path, cache):
    data = write_data(tmp_path / "d.json", GOLDEN_SAMPLES[:1])
    failure = training_set(student_vlm, data, cache, template="plain")[0]
    assert isinstance(failure, FailedSample)
    assert failure.fatal
    assert "'cap0'" in failure.reason
    assert "token ids differ: the tokenizer, template or maximum length" in failure.reason


def test_other_token_ids_labels_or_vision_tokens_are_misaligned(student_vlm, cache):
    sample = parse_sample(GOLDEN_SAMPLES[0], "")
    row, stored = (
        CacheReader(cache).row(sample.key),
        CacheReader(cache).encoded_fields(sample.key, ["attention", "vision_tokens"]),
    )
    prepared = preparer(student_vlm)(sample)
    check_row(sample, prepared, row, stored, Collator(144, 0))

    def changed(field):
        values = {"input_ids": prepared.input.input_ids.copy(), "labels": prepared.input.labels.copy()}
        values[field][-1] += 1
        return Prepared(type(prepared.input)(**values, images=prepared.input.images), prepared.image_sha256, truncated=False)

    with pytest.raises(MisalignedRowError, match=r"'cap0'.*token ids differ: the tokenizer"):
        check_row(sample, changed("input_ids"), row, stored, Collator(144, 0))
    with pytest.raises(MisalignedRowError, match=r"'cap0'.*labels differ: the template"):
        check_row(sample, changed("labels"), row, stored, Collator(144, 0))
    with pytest.raises(MisalignedRowError, match=r"'cap0'.*144 vision tokens where the student has 36"):
        check_row(sample, prepared, row, stored, Collator(36, 0))
    heads, rows, columns = stored["attention"].shape
    fewer = {"attention": replace(stored["attention"], shape=(heads, rows - 1, columns))}
    with pytest.raises(MisalignedRowError, match=f"attention of {rows - 1} text rows to 144 .* student has {rows} and 144"):
        check_row(sample, prepared, row, fewer, Collator(144, 0))


def test_a_sample_without_a_row_is_refused_by_name_with_the_cause(student_vlm, tmp_path, cache):
    changed = {**SAMPLES[0], "id": "renamed"}
    with pytest.raises(ValueError, match=r"(?s)'renamed' has no row in the cache.*never planned.*id, image references"):
        training_set(student_vlm, write_data(tmp_path / "d.json", [SAMPLES[1], changed]), cache)


def test_a_sample_whose_shard_is_not_written_yet_is_refused_with_the_way_on(student_vlm, tmp_path, data, cache):
    shutil.copytree(cache, tmp_path / "cache")
    (tmp_path / "cache" / "commits" / "000001.json").unlink()
    with pytest.raises(ValueError, match=r"shard 1, which was not committed yet; run alignkd cache-teacher again"):
        training_set(student_vlm, data, tmp_path / "cache")


def test_identical_samples_share_one_row(student_vlm, tmp_path, cache):
    double = training_set(student_vlm, write_data(tmp_path / "d.json", [SAMPLES[0], SAMPLES[1], SAMPLES[0]]), cache)
    assert len(double) == 3
    first, third = (double[i].stored["attention"].parts["codes"] for i in (0, 2))
    np.testing.assert_array_equal(first, third)
    assert double.shard_of_sample.tolist() == [0, 0, 0]


def test_a_damaged_shard_ends_the_run(student_vlm, tmp_path, data, cache):
    shutil.copytree(cache, tmp_path / "cache")
    for shard in (tmp_path / "cache" / "shards").iterdir():
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    failure = training_set(student_vlm, data, tmp_path / "cache")[0]
    assert isinstance(failure, FailedSample)
    assert failure.fatal
    assert "found crc32" in failure.reason


def test_a_training_set_crosses_to_worker_processes(student_vlm, data, cache):
    whole = training_set(student_vlm, data, cache)
    first = whole[3]
    again = pickle.loads(pickle.dumps(whole))[3]
    np.testing.assert_array_equal(first.input.images, again.input.images)
    for part, codes in first.stored["vision_tokens"].parts.items():
        np.testing.assert_array_equal(codes, again.stored["vision_tokens"].parts[part])


def test_without_a_cache_every_sample_is_trained_on(student_vlm, data):
    plain = training_set(student_vlm, data, None, needs=frozenset())
    assert len(plain) == 6
    assert plain[0].stored == {}
    assert plain.collate([plain[0], plain[4]])["targets"] == Targets()
