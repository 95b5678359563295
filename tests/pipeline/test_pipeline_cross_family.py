"""Teacher and student of different model families: a cache of one serves the other through geometry and characters."""

from __future__ import annotations

import json
import math
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import (
    STUDENT,
    TEACHER,
    copy_checkpoint,
    metrics,
    record,
    stage_two_config,
    train,
    write_cache,
    write_data,
)

from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.errors import CacheError
from alignkd.losses.recipes import get_recipe
from alignkd.models.loading import load_vlm
from alignkd.pipeline.cache_io.compatibility import check_student_compatible
from alignkd.pipeline.cache_io.cross_model import CrossModelMap
from alignkd.pipeline.config.targets import TargetSettings
from alignkd.pipeline.data.preparer import Preparer
from alignkd.pipeline.data.samples import SampleFile
from alignkd.pipeline.evaluate.show_sample import captured_arrays
from alignkd.pipeline.feeding.dataset import TrainingSet
from alignkd.pipeline.feeding.row_checks import MisalignedRowError
from alignkd.pipeline.training.run import distill
from alignkd.targets.logits import LogitSettings

sys.path.append(str(Path(__file__).parents[1] / "families"))  # the builders of other families' checkpoints
import make_qwen2_5_vl
from make_llava import TEMPLATE
from tiny_parts import text_settings
from tiny_tokenizers import sentencepiece
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

ALL = frozenset({"attention", "vision", "logits"})
SAMPLES = [
    record("square", "square.png", "<image>\nWhat colour is it?", "It is blue."),
    record("wide", "wide.png", "What is it?\n<image>", "a dog é😀\nand  the mat"),
    record("text", None, "What is red?", "the cat"),
    record("two", ["square.png", "wide.png"], "<image>\nand <image> which is red?", "green"),
]
EXACT = TargetSettings(attention_codec="exact", vision_codec="exact", logits=LogitSettings("topk", top_k=1000))


def write_llava(folder, seed=0):
    """LLaVA 1.5's shape: 336 pixels in patches of 14, so 576 vision tokens; everything else is tiny."""
    tokenizer = sentencepiece(["<image>"], pad="<pad>")
    images = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    settings = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=336, patch_size=14
        ),
        text_config=LlamaConfig(**text_settings(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=576,
    )
    torch.manual_seed(seed)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(images, tokenizer, chat_template=TEMPLATE, **settings).save_pretrained(folder)
    return folder


def write_student(folder):
    """The golden student, its vocabulary and tokenizer those of :func:`write_llava`."""
    tokenizer = sentencepiece(["<image>"], pad="<pad>")
    copy_checkpoint(STUDENT, folder, vocab_size=len(tokenizer))
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][: len(tokenizer)].clone()
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "tokenizer.model").unlink()
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models, data and images of these tests."""
    folder = tmp_path_factory.mktemp("cross")
    rng = np.random.default_rng(0)
    for name, size in (("square.png", (48, 48)), ("wide.png", (64, 40))):
        Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(folder / name)
    write_data(folder / "data.json", SAMPLES)
    write_llava(folder / "llava")
    make_qwen2_5_vl.write(folder / "qwen")
    write_student(folder / "student")
    return folder


@pytest.fixture(scope="module")
def llava_cache(place):
    write_cache(place / "data.json", place / "llava-cache", teacher=str(place / "llava"), images=str(place), settings=EXACT)
    return place / "llava-cache"


@pytest.fixture(scope="module")
def qwen_cache(place):
    write_cache(place / "data.json", place / "qwen-cache", teacher=str(place / "qwen"), images=str(place))
    return place / "qwen-cache"


def training_set(vlm, place, cache, needs=ALL, template=None):
    template = template or vlm.default_template
    reader = CacheReader(cache)
    fields = [field.name for field in reader.spec.fields]
    cross_model = check_student_compatible(vlm, reader.fingerprint, template, 2048, "cache", needs=needs, fields=fields)
    assert cross_model is not None
    preparer = Preparer.of(vlm, template=template, max_length=2048, image_root=place)
    samples = SampleFile(place / "data.json")
    return TrainingSet(samples, preparer, student=vlm, reader=reader, needs=needs, max_rejected=0, cross_model=cross_model)


def cross_train(place, cache, out, student="student", **changes):
    student = str(student if isinstance(student, Path) else place / student)
    train(place / "data.json", cache, out, student=student, images=str(place), max_steps=3, **changes)
    return metrics(out)


def test_llava_into_mobilevlm_with_every_term(place, llava_cache, tmp_path):
    lines = cross_train(place, llava_cache, tmp_path / "out")
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        for term in ("loss", "supervised", "reverse_kl", "attention", "vision_all", "vision_focus"):
            assert math.isfinite(line[term])
        assert min(line["reverse_kl"], line["attention"], line["vision_all"]) > 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["samples"], result["rejected"]) == (6, 0)
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["configuration"]["template"] == "v1"


def test_the_targets_of_a_sample_are_its_teachers_by_hand(place, llava_cache):
    """A square image: four of 24 x 24 cells are one of 12 x 12. One tokenizer: each token is its own partner."""
    student, teacher = load_vlm(place / "student"), load_vlm(place / "llava")
    data = training_set(student, place, llava_cache)
    collated = data.collate([data[0]])
    targets, ids = collated["targets"].dequantise(), collated["batch"].input_ids_BS[0]
    seen = captured_arrays(teacher, Preparer.of(teacher, template="chat", max_length=2048, image_root=place)(data.sample(0)))
    blocks_HT = seen["attention_HTV"].reshape(4, -1, 12, 2, 12, 2).sum(axis=(3, 5)).reshape(4, -1, 144)
    ours = [student.tokenizer.convert_ids_to_tokens(int(i)) for i in ids[collated["batch"].text_rows_BT[0]]]
    theirs = [teacher.tokenizer.convert_ids_to_tokens(int(i)) for i in seen["input_ids"]]
    theirs = theirs[theirs.index("<image>") + 576 :]

    def stretch(pieces, words):
        """Where the pieces spell the words, which neither template says."""
        starts = [i for i in range(len(pieces)) if "".join(pieces[i:]).replace("\u2581", " ").strip().startswith(words)]
        ends = [i for i in range(len(pieces)) if "".join(pieces[: i + 1]).replace("\u2581", " ").endswith(words)]
        return list(range(starts[-1], ends[0] + 1))

    known = torch.zeros(len(ours), dtype=torch.bool)
    for words in ("What colour is it?", "It is blue."):
        mine, its = ([i for i in stretch(pieces, words) if pieces[i].strip("\u2581")] for pieces in (ours, theirs))
        assert [ours[i] for i in mine] == [theirs[i] for i in its]
        np.testing.assert_allclose(targets.attention[0][0, :, mine], blocks_HT[:, its], atol=1e-6)
        known[mine] = True
    np.testing.assert_array_equal(targets.row_mask_BT[0], known)
    assert targets.column_mask_BV.all()
    means_VD = seen["vision_tokens_VD"].reshape(12, 2, 12, 2, 32).mean(axis=(1, 3)).reshape(144, 32)
    np.testing.assert_allclose(targets.vision_BVD[0], means_VD, atol=1e-5)
    assert len(targets.answers["tail_logmass"]) == len(collated["batch"].answer_ids_A) == len(seen["answer_logits_AN"])
    assert targets.paired_P is None


def test_a_batch_gives_each_sample_the_targets_that_it_has_alone(place, llava_cache):
    data = training_set(load_vlm(place / "student"), place, llava_cache)
    items = [data[i] for i in range(4)]
    together, answers = data.collate(items), 0
    targets = together["targets"].dequantise()
    for i, item in enumerate(items):
        alone = data.collate([item])
        one, batch = alone["targets"].dequantise(), alone["batch"]
        rows, columns = batch.text_rows_BT.shape[1], batch.vision_columns_BV.shape[1]
        for found, expected in (
            (targets.attention[0][i], one.attention[0][0]),
            (targets.vision_BVD[i], one.vision_BVD[0]),
        ):
            np.testing.assert_array_equal(found[tuple(map(slice, expected.shape))], expected)
            assert found.sum() == pytest.approx(float(expected.sum()), rel=1e-5)
        np.testing.assert_array_equal(targets.row_mask_BT[i, :rows], one.row_mask_BT[0])
        np.testing.assert_array_equal(targets.column_mask_BV[i, :columns], one.column_mask_BV[0])
        assert not targets.row_mask_BT[i, rows:].any()
        assert not targets.column_mask_BV[i, columns:].any()
        count = len(one.answers["tail_logmass"])
        np.testing.assert_array_equal(targets.answers["tail_logmass"][answers : answers + count], one.answers["tail_logmass"])
        answers += count
    assert answers == len(targets.answers["tail_logmass"])


def test_rows_that_have_seen_other_images_have_no_target(place, qwen_cache):
    """Qwen reads 'and' between two images; MobileVLM moves both to the front."""
    data = training_set(load_vlm(place / "student"), place, qwen_cache, needs=ALL - {"logits"})
    collated = data.collate([data[3]])
    targets, batch = collated["targets"].dequantise(), collated["batch"]
    spans = data[3].input.spans[-len(batch.text_rows_BT[0]) :]
    between = (spans[:, 0] < len("and")) & (spans[:, 0] < spans[:, 1])
    after = (spans[:, 0] >= len("and")) & (spans[:, 0] < spans[:, 1])
    assert between.any()
    assert not targets.row_mask_BT[0].numpy()[between].any()
    assert targets.row_mask_BT[0].numpy()[after].all()


@pytest.mark.slow
def test_mobilevlm_into_llava_takes_the_students_own_template(place, tmp_path):
    cache = tmp_path / "cache"
    write_cache(place / "data.json", cache, teacher=str(place / "student"), images=str(place))
    lines = cross_train(place, cache, tmp_path / "out", student="llava")
    assert all(math.isfinite(line["loss"]) and line["reverse_kl"] > 0 and line["attention"] > 0 for line in lines)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["configuration"]["template"] == "chat"


def test_qwen_into_mobilevlm_without_logits_and_refused_with_them(place, qwen_cache, tmp_path):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the parts follow
        cross_train(place, qwen_cache, tmp_path / "out")
    fingerprints = [load_vlm(place / name).tokenizer_fingerprint()[:12] for name in ("qwen", "student")]
    for part in ("logits need the same tokenizer", *fingerprints, "--set reverse_kl=0", "family: qwen2_5_vl in the cache"):
        assert part in str(error.value)
    lines = cross_train(place, qwen_cache, tmp_path / "out", overrides={"reverse_kl": "0"})
    for line in lines:
        assert math.isfinite(line["loss"])
        assert min(line["attention"], line["vision_all"], line["vision_focus"]) > 0


def test_another_width_of_the_output_head_is_refused_with_logits(place, llava_cache):
    student, found = load_vlm(place / "student"), CacheReader(llava_cache).fingerprint
    found["teacher"] = {**found["teacher"], "vocabulary": 64}
    with pytest.raises(ValueError, match=r"the same tokenizer and output head width: vocabulary: 64 in the cache, \d+ here"):
        check_student_compatible(student, found, "v1", 2048, "cache", needs=ALL, fields=["spans", "regions"])


def test_other_vision_tokens_alone_keep_rows_and_answers_as_they_are(data, cache, tmp_path):
    """Same template and tokenizer, 36 vision tokens in place of 144: the template's own rows have targets, too."""
    student = copy_checkpoint(STUDENT, tmp_path / "student", mm_projector_grid=6)
    vlm = load_vlm(student)
    reader, samples = CacheReader(cache), SampleFile(data)
    fields = [field.name for field in reader.spec.fields]
    cross_model = check_student_compatible(vlm, reader.fingerprint, "v1", 2048, "cache", fields=fields)
    preparer = Preparer.of(vlm, template="v1", max_length=2048, image_root=Path(STUDENT).parent / "images")
    whole = TrainingSet(samples, preparer, student=vlm, reader=reader, needs=ALL, max_rejected=0, cross_model=cross_model)
    item = whole[0]
    held = reader.row(samples[0].key).values["attention"]
    expected = held.reshape(8, -1, 6, 2, 6, 2).sum(axis=(3, 5)).reshape(8, -1, 36)
    np.testing.assert_allclose(item.stored["attention"].parts["values"], expected, atol=1e-6)
    assert item.target_mask.rows.all()
    assert item.target_mask.columns.all()
    assert item.target_mask.answers.all()
    train(data, cache, tmp_path / "out", student=str(student), max_steps=2)
    assert all(math.isfinite(line["loss"]) for line in metrics(tmp_path / "out"))


def test_a_row_of_the_same_make_is_the_same_through_the_maps_to_the_bit(student_vlm, data, cache):
    reader, samples = CacheReader(cache), SampleFile(data)
    preparer = Preparer.of(student_vlm, template="v1", max_length=2048, image_root=Path(STUDENT).parent / "images")
    settings = {"student": student_vlm, "reader": reader, "needs": ALL, "max_rejected": 0}
    plain = TrainingSet(samples, preparer, **settings)
    mapped = TrainingSet(samples, preparer, **settings, cross_model=CrossModelMap.of(student_vlm, reader.fingerprint))
    for i in range(len(samples)):
        one, other = (x.collate([x[i]]) for x in (plain, mapped))
        expected, found = one["targets"].dequantise(), other["targets"].dequantise()
        assert torch.equal(expected.attention[0], found.attention[0])
        assert torch.equal(expected.vision_BVD, found.vision_BVD)
        assert expected.answers.keys() == found.answers.keys()
        assert all(torch.equal(expected.answers[name], found.answers[name]) for name in expected.answers)
        assert found.row_mask_BT.all()
        assert found.column_mask_BV.all()
        assert found.paired_P is None


def test_a_cache_of_the_same_make_is_read_as_it_is(student_vlm, cache):
    found = CacheReader(cache).fingerprint
    assert check_student_compatible(student_vlm, found, "v1", 2048, "cache") is None


def test_a_changed_image_and_an_answer_split_otherwise_are_refused_by_name(place, llava_cache, monkeypatch):
    data = training_set(load_vlm(place / "student"), place, llava_cache)
    real = data.reader.row
    with monkeypatch.context() as patch:
        patch.setattr(data.reader, "row", lambda *given: replace(real(*given), image_sha256="0" * 64))
        assert "'square' does not match its row in the cache: its image file differs" in data[0].reason

    def other_ids(*given):
        row = real(*given)
        ids, first = row.values["input_ids"].copy(), int(np.flatnonzero(row.values["labels"] >= 0)[0])
        ids[first] += 1
        return replace(row, values={**row.values, "input_ids": ids})

    monkeypatch.setattr(data.reader, "row", other_ids)
    failure = data[0]
    assert failure.fatal
    assert "sample 'square' cannot be mapped to its row in the cache: tokenizer mismatch: the" in failure.reason


def test_a_misaligned_sample_ends_the_run(place, llava_cache, tmp_path, monkeypatch):
    real = CacheReader.row
    monkeypatch.setattr(CacheReader, "row", lambda *given: replace(real(*given), image_sha256="0" * 64))
    with pytest.raises(MisalignedRowError, match="its image file differs"):
        cross_train(place, llava_cache, tmp_path / "out")


def test_a_slice_and_a_cache_without_spans_serve_their_own_make_alone(place, tmp_path):
    data, other = place / "data.json", {"teacher": str(place / "student"), "images": str(place)}
    write_cache(data, tmp_path / "slice", alignment="slice", **other)
    assert {field.name for field in CacheReader(tmp_path / "slice").spec.fields}.isdisjoint({"spans", "regions"})
    with pytest.raises(ValueError, match=r"holds a slice of the teacher, which only a student with the teacher's architecture"):
        cross_train(place, tmp_path / "slice", tmp_path / "out", student="llava")
    write_cache(data, tmp_path / "bare", settings=TargetSettings(cross_model=False), **other)
    with pytest.raises(ValueError, match=r"its rows lack regions and spans.*write another cache"):
        cross_train(place, tmp_path / "bare", tmp_path / "out", student="llava")


@pytest.mark.slow
def test_logits_alone_need_no_regions(place, tmp_path):
    settings = TargetSettings(targets=("logits",))
    write_cache(place / "data.json", tmp_path / "cache", teacher=str(place / "llava"), images=str(place), settings=settings)
    names = {field.name for field in CacheReader(tmp_path / "cache").spec.fields}
    assert "spans" in names
    assert "regions" not in names
    lines = cross_train(place, tmp_path / "cache", tmp_path / "out", recipe="logits-only")
    assert all(line["reverse_kl"] > 0 for line in lines)


def test_a_teacher_in_the_loop_of_another_make_is_to_be_cached_first(place, tmp_path):
    with pytest.raises(ValueError, match=r"family: llava of the teacher, mobilevlm here.*cache it first"):
        cross_train(place, None, tmp_path / "out", online_teacher=str(place / "llava"))


def test_what_a_family_without_places_gives_is_refused_before_the_data_is_read(place, llava_cache, monkeypatch):
    student, found = load_vlm(place / "student"), CacheReader(llava_cache).fingerprint
    found["teacher"] = {**found["teacher"], "no_place": "queries look everywhere"}
    with pytest.raises(
        ValueError,
        match=r"have no coordinates, so they cannot be mapped: queries look everywhere.*without attention and vision",
    ):
        check_student_compatible(student, found, "v1", 2048, "cache", needs=ALL, fields=["spans", "regions"])
    only_logits = check_student_compatible(student, found, "v1", 2048, "cache", needs=frozenset({"logits"}), fields=["spans"])
    assert pickle.loads(pickle.dumps(only_logits)) == only_logits


def test_a_row_of_a_teacher_of_other_shape_is_stored_with_its_layout(place, llava_cache):
    samples, reader = SampleFile(place / "data.json"), CacheReader(llava_cache)
    values = reader.row(samples[3].key).values
    assert values["spans"].shape == (len(values["input_ids"]), 2)
    assert values["regions"].shape == (2, 8)
    assert values["regions"][:, :3].tolist() == [[0, 24, 24], [1, 24, 24]]
    assert reader.row(samples[2].key).values["regions"].shape == (0, 8)
    assert reader.fingerprint["teacher"]["family"] == "llava"
    assert load_vlm(TEACHER).template_fingerprint() == ""


@pytest.mark.slow
def test_two_teachers_of_other_families_and_tokenizers_teach_one_student(place, llava_cache, qwen_cache, tmp_path):
    """Neither has the student's vision tokens, nor each other's: the rows of both are mapped."""
    overrides = {"reverse_kl": "0"}
    cross_train(place, llava_cache, tmp_path / "one", overrides=overrides)
    config = stage_two_config(place / "data.json", None, tmp_path / "two", overrides=overrides, max_steps=3)
    config = replace(config, student=str(place / "student"), images=str(place), cache=(str(llava_cache), str(qwen_cache)))
    distill(replace(config, cache_weight=(1.0, 0.0)))
    for line, alone in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert all(line[name] == alone[name] for name in ("loss", "supervised", "attention", "vision_all"))
    found = distill(replace(config, out=str(tmp_path / "three")))
    assert [one["samples"] for one in found["teachers"]] == [found["samples"]] * 2
    for line in metrics(tmp_path / "three"):
        own = [line[name] for name in ("vision_all/teacher1", "vision_all/teacher2", "attention/teacher1") if name in line]
        assert all(math.isfinite(value) for value in own)
    with pytest.raises(CacheError, match="logits need the same tokenizer"):
        distill(replace(config, out=str(tmp_path / "four"), recipe=get_recipe("align-kd")))
