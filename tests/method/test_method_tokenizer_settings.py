"""Settings of MobileVLM's tokenizer and images are honoured as its training code does, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from alignkd.errors import CheckpointError
from alignkd.inputs.prompts import encode_conversation
from alignkd.models.checkpoints.mobilevlm_layout import read_official
from alignkd.models.checkpoints.tokenizer_files import check_tokenizer, load_tokenizer

GOLDEN = Path(__file__).parents[1] / "data" / "mobilevlm_v2_tiny" / "student"
TURNS = [("human", "what is it?"), ("gpt", "a dog"), ("human", "and now?"), ("gpt", "a cat")]


class Tokens:
    """A tokenizer with these tokens."""

    bos_token_id, eos_token_id = 0, 1

    def __init__(self, **tokens):
        self.tokens = {"<s>": 0, "</s>": 1, **tokens}

    def get_vocab(self):
        return self.tokens

    def __len__(self):
        return len(self.tokens)


@pytest.fixture
def golden_folder(tmp_path):
    """The golden tokenizer's files."""
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(GOLDEN / name, tmp_path / name)
    return tmp_path


def test_a_tokenizer_that_pads_with_its_end_token_gives_the_labels_that_it_was_trained_with(golden_folder):
    plain = load_tokenizer(golden_folder)
    expected = encode_conversation(TURNS, template="v1", tokenizer=plain, has_image=False, max_length=2048)
    path = golden_folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "</s>"}))
    padded = load_tokenizer(golden_folder)
    assert padded.pad_token_id == padded.unk_token_id
    made = encode_conversation(TURNS, template="v1", tokenizer=padded, has_image=False, max_length=2048)
    assert made.supervised == expected.supervised > 0
    assert made.labels.tolist() == expected.labels.tolist()


def test_a_token_beside_the_vocabulary_is_refused_by_name(tmp_path):
    check_tokenizer(tmp_path, Tokens(a=2), 3)
    with pytest.raises(CheckpointError, match="'<im_patch>' beside the model's vocabulary of 3 tokens"):
        check_tokenizer(tmp_path, Tokens(**{"<im_patch>": 7}), 3)


def test_marks_around_images_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="mm_use_im_start_end is true"):
        read_official(tmp_path, {"mm_projector_type": "ldpnetv2", "mm_use_im_start_end": True}, None, None)
