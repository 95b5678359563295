"""A teacher whose vocabulary extends the student's: its logits are cached over the first ids, which both share."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from tiny_runs import (
    IMAGES,
    SAMPLES,
    STUDENT,
    TEACHER,
    metrics,
    record,
    train,
    with_vocabulary,
    write_cache,
    write_data,
)

from alignkd.cache_store.errors import FingerprintMismatchError
from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.cli import main
from alignkd.models.loading import load_vlm
from alignkd.models.vlm import Vlm
from alignkd.pipeline.cache_io.compatibility import check_online_teacher, check_student_compatible
from alignkd.pipeline.cache_io.logits import open_codec, settings_of
from alignkd.pipeline.config.targets import TargetSettings
from alignkd.pipeline.data.preparer import Preparer
from alignkd.pipeline.data.samples import SampleFile
from alignkd.pipeline.evaluate.show_sample import captured_arrays
from alignkd.pipeline.feeding.dataset import TrainingSet
from alignkd.targets.logits import LogitSettings
from tests.reference.logits import divergence

sys.path.append(str(Path(__file__).parents[1] / "families"))  # the builders of other families' checkpoints
from make_llava import TEMPLATE
from tiny_parts import text_settings, tower_settings
from transformers import (
    AddedToken,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

SHARED, HEAD = 512, 544
"""The student's vocabulary, and the teacher's head: two more tokens, the rest is padding."""
ALL = frozenset({"attention", "vision", "logits"})


def write_teacher(folder):
    """LLaVA 1.5 in little: the student's SentencePiece model as a fast tokenizer, <image>, <pad>, and a padded head."""
    tokenizer = LlamaTokenizer.from_pretrained(STUDENT)
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=True) for name in ("<image>", "<pad>")])
    tokenizer.pad_token = "<pad>"
    assert tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [SHARED, SHARED + 1]
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    settings = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tower_settings()),
        text_config=LlamaConfig(**text_settings(tokenizer, vocab_size=HEAD)),
        image_token_index=SHARED,
        image_seq_length=16,
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(images, tokenizer, chat_template=TEMPLATE, **settings).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    write_teacher(folder / "llava")
    write_data(folder / "data.json", SAMPLES)
    return folder


@pytest.fixture(scope="module")
def llava(place):
    return load_vlm(place / "llava")


def write(place, name, data="data.json", kind="hidden", vocabulary=SHARED, **changes):
    settings = TargetSettings(logits=LogitSettings(kind, top_k=1000, hidden_bits=16, vocabulary=vocabulary))
    changes = {"teacher": str(place / "llava"), "settings": settings, **changes}
    write_cache(place / data, place / name, **changes)
    return place / name


@pytest.fixture(scope="module")
def cut(place):
    return write(place, "cut")


@pytest.fixture(scope="module")
def whole(place):
    return write(place, "whole", vocabulary=None)


def fit(student, cache, **changes):
    reader = CacheReader(cache)
    fields = [field.name for field in reader.spec.fields]
    return check_student_compatible(student, {**reader.fingerprint, **changes}, "v1", 2048, "cache", needs=ALL, fields=fields)


@pytest.mark.slow
def test_a_cache_made_by_the_option_serves_three_steps_of_align_kd(place, tmp_path):
    options = ["--teacher", place / "llava", "--data", place / "data.json", "--images", IMAGES, "--cache", tmp_path / "cache"]
    options += ["--logit-vocabulary", SHARED, "--device", "cpu"]
    done = CliRunner().invoke(main, ["cache-teacher", *map(str, options)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    train(place / "data.json", tmp_path / "cache", tmp_path / "out", max_steps=3)
    lines = metrics(tmp_path / "out")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(math.isfinite(line["loss"]) and min(line["reverse_kl"], line["attention"]) > 0 for line in lines)


@pytest.mark.parametrize("kind", ["hidden", "topk", "sampled", "sketch"])
def test_divergences_are_those_of_the_dense_distribution_over_the_shared_ids(place, llava, student_vlm, kind):
    """Kinds that keep tokens keep all here, each log-probability in 8 bits, whose errors cancel out over an answer's tokens.

    The logits come from a forward pass over the sample alone, the targets through cache and loader.
    """
    reader = CacheReader(write(place, f"dense-{kind}", kind=kind))
    cross_model = fit(student_vlm, reader.url)
    preparer = Preparer.of(student_vlm, template="v1", max_length=2048, image_root=IMAGES)
    samples = SampleFile(place / "data.json")
    data = TrainingSet(
        samples,
        preparer,
        student=student_vlm,
        reader=reader,
        needs=frozenset({"logits"}),
        max_rejected=0,
        cross_model=cross_model,
    )
    codec = open_codec(settings_of(reader.fingerprint), reader.tensors, "cpu")
    theirs = Preparer.of(llava, template="chat", max_length=2048, image_root=IMAGES)
    for i in range(len(samples)):
        collated = data.collate([data[i]])
        targets = collated["targets"].dequantise()
        seen = captured_arrays(llava, theirs(samples[i]))
        kept = slice(None) if targets.paired_P is None else targets.paired_P
        labels = collated["batch"].answer_ids_A[kept]
        teacher_labels = seen["labels"][1:][seen["labels"][1:] >= 0]
        assert labels.tolist() == teacher_labels[: len(labels)].tolist()
        dense_AN = torch.from_numpy(seen["answer_logits_AN"])[: len(labels), :SHARED].log_softmax(dim=1)
        torch.manual_seed(i)
        student_AN = torch.randn(len(labels), SHARED)
        logprobs_AN = student_AN.log_softmax(dim=1)
        expected = {
            "reverse_kl": (logprobs_AN.exp() * (logprobs_AN - dense_AN)).sum(dim=1),
            "forward_kl": (dense_AN.exp() * (dense_AN - logprobs_AN)).sum(dim=1),
        }
        for name, expected_A in expected.items():
            found_A = divergence(codec, name, student_AN, targets.answers, 1.0)
            if kind == "hidden":
                torch.testing.assert_close(found_A, expected_A, rtol=2e-3, atol=2e-3)
            assert float(found_A.mean()) == pytest.approx(float(expected_A.mean()), rel=2e-2)


def test_tensors_and_fields_of_a_cut_cache_are_as_long_as_the_students_vocabulary(place, cut, whole):
    assert len(CacheReader(cut).tensors["logits.output_head"]) == SHARED
    assert len(CacheReader(whole).tensors["logits.output_head"]) == HEAD
    sketched = CacheReader(write(place, "sketch", kind="sketch"))
    assert {len(sketched.tensors[f"logits.{name}"]) for name in ("id_of_rank", "sketch_head", "sketch_base")} == {SHARED}
    assert sketched.fingerprint["targets"]["logits"]["top_k"] == SHARED


def test_without_the_option_the_refusal_names_it_and_the_fingerprint_is_as_ever(student_vlm, whole):
    found = CacheReader(whole).fingerprint
    assert found["targets"]["logits"] == {"kind": "hidden", "temperature": None, "hidden_bits": 16}
    assert "tokenizer_first_ids" not in found
    with pytest.raises(ValueError, match=r"vocabulary: 544 in the cache, 512 here.* cache with --logit-vocabulary 512"):
        fit(student_vlm, whole)


def test_a_cut_cache_is_refused_where_width_or_first_ids_differ(place, student_vlm, cut):
    found = CacheReader(cut).fingerprint
    assert found["targets"]["logits"]["vocabulary"] == SHARED
    own = student_vlm.tokenizer_fingerprint(SHARED)
    assert found["tokenizer_first_ids"] == own
    with pytest.raises(ValueError, match=rf"tokenizer's first 512 ids: 0{{12}} in the cache, {own[:12]} here") as error:
        fit(student_vlm, cut, tokenizer_first_ids="0" * 64)
    assert "--logit-vocabulary" not in str(error.value)
    with pytest.raises(ValueError, match=r"vocabulary: 500 in the cache, 512 here.* cache with --logit-vocabulary 512"):
        fit(student_vlm, write(place, "shorter", vocabulary=500))


def test_another_number_of_ids_is_another_cache(place, cut):
    with pytest.raises(FingerprintMismatchError, match=r"targets.logits.vocabulary: cache has 512, wanted 500"):
        write(place, "cut", vocabulary=500)
    assert CacheReader(cut).fingerprint["targets"]["logits"]["vocabulary"] == SHARED


def test_more_ids_than_the_head_has_and_ids_without_logits_are_refused(place):
    with pytest.raises(ValueError, match=r"--logit-vocabulary 545: the teacher's output head has 544 columns"):
        write(place, "none", vocabulary=HEAD + 1)
    settings = TargetSettings(targets=("vision",), logits=LogitSettings(vocabulary=SHARED))
    with pytest.raises(ValueError, match=r"--logit-vocabulary 512 needs logits among --targets"):
        write(place, "none", settings=settings)
    with pytest.raises(ValueError, match="--logit-vocabulary is 0: expected 1 or more"):
        LogitSettings(vocabulary=0)


def test_an_answer_with_a_token_beyond_the_ids_kept_is_rejected_by_name_and_a_question_is_not(place, llava):
    last = llava.tokenizer.convert_ids_to_tokens(SHARED - 1)
    write_data(
        place / "last.json", [record("answered", None, "What?", f"It is {last}."), record("asked", None, last, "It is.")]
    )
    reader = CacheReader(write(place, "last", data="last.json", vocabulary=SHARED - 1))
    (rejected,) = reader.rejected.values()
    assert rejected.sample_id == "answered"
    assert rejected.reason == f"its answer holds {last!r}, id 511, but --logit-vocabulary 511 keeps only the ids below 511"
    assert reader.find("asked")
    assert not CacheReader(write(place, "last-too", data="last.json")).rejected


@pytest.mark.slow
def test_a_wider_head_of_the_students_own_make_is_met_as_it_is(data, tmp_path, student_vlm):
    teacher = str(with_vocabulary(TEACHER, tmp_path / "wide", HEAD))
    write_cache(data, tmp_path / "whole", teacher=teacher)
    with pytest.raises(ValueError, match=r"vocabulary: 544 in the cache, 512 here.*; cache with --logit-vocabulary 512"):
        fit(student_vlm, tmp_path / "whole")
    write_cache(data, tmp_path / "cut", teacher=teacher, settings=TargetSettings(logits=LogitSettings(vocabulary=SHARED)))
    assert fit(student_vlm, tmp_path / "cut") is None
    train(data, tmp_path / "cut", tmp_path / "out", max_steps=1)
    assert metrics(tmp_path / "out")[0]["reverse_kl"] > 0


def test_a_teacher_in_the_loop_that_extends_the_student_is_to_be_cached_with_the_option(student_vlm, llava):
    with pytest.raises(ValueError, match=r"cache it first \(alignkd cache-teacher --logit-vocabulary 512\)"):
        check_online_teacher(student_vlm, llava, "v1")


def test_the_digest_of_first_ids_sees_what_matters_and_nothing_else(student_vlm, llava):
    def digest(limit=SHARED, **changes):
        real = student_vlm.tokenizer
        parts = {"bos_token_id": 1, "eos_token_id": 2, "get_vocab": real.get_vocab, **changes}

        class Other:
            def __call__(self, text, **settings):
                return real(changes.get("words", text), **settings)

        other = Other()
        vars(other).update({"pad_token_id": 0, **parts})
        return Vlm.tokenizer_fingerprint(SimpleNamespace(tokenizer=other), limit)

    vocabulary = student_vlm.tokenizer.get_vocab()
    swapped = {**vocabulary, "a": vocabulary["b"], "b": vocabulary["a"]}
    same = student_vlm.tokenizer_fingerprint(SHARED)
    assert llava.tokenizer_fingerprint(SHARED) == digest() == digest(pad_token_id=9) == same
    assert digest(get_vocab=lambda: {**vocabulary, "<new>": SHARED}) == same
    others = [
        digest(get_vocab=lambda: swapped),
        digest(eos_token_id=5),
        digest(bos_token_id=None),
        digest(words="split otherwise"),
        digest(get_vocab=lambda: {**vocabulary, "<new>": SHARED}, limit=SHARED + 1),
    ]
    assert same not in others
    assert len(set(others)) == len(others)


def test_the_digest_of_a_whole_tokenizer_stays_the_one_that_caches_hold(student_vlm):
    assert student_vlm.tokenizer_fingerprint().startswith("60fef9ecc0a971da")
